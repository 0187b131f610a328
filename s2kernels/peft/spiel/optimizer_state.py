"""The optimizer's states of entries: they move when entries are replaced."""

from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from s2kernels.optim import SM3, AgedAdamW
from s2kernels.peft.spiel.replace import Replacement

# Per entry, and 0 for one that has no history. Anything else would be moved wrongly, or not at all.
_PER_ENTRY = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "age", "momentum_buffer")
# of the whole weight, or of no entry in particular
_SHARED = ("row", "col", "step")


def bare_optimizer(optimizer: Any, selection: str) -> Optimizer:
    """The torch optimizer inside of what accelerate has wrapped.

    Raises TypeError for one whose states of single entries cannot be moved, or that does not go
    with the selection.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    momentum = selection == "momentum_approximation"
    if not isinstance(optimizer, SM3 if momentum else (AgedAdamW, Adam, SGD, SM3)):
        wanted = "SM3" if momentum else "AgedAdamW, torch's Adam, AdamW or SGD, or SM3"
        raise TypeError(
            f"selection={selection!r} needs {wanted} as its optimizer, "
            f"got {type(optimizer).__name__}"
        )
    return optimizer


def move_states(
    optimizer: Optimizer,
    delta: Tensor,
    replaced: Replacement,
    seeds: tuple[Tensor, Tensor, int] | None = None,
) -> None:
    """Move the states of a delta's entries as they are moved; the delta itself is not touched.

    seeds: mean gradient and mean squared gradient of the grown entries, (r,) each, and the number
    of steps they are means over. Adam's averages of a grown entry are set to what its bias
    correction, which divides by 1 - beta^age, turns into these means. With AgedAdamW age is that
    number of steps. With torch's Adam and AdamW it is the step count that all entries share: the
    means are right there, too, and weigh as much as the whole history of an old entry.

    Raises TypeError for a state that is not known, before anything is moved.
    """
    state = optimizer.state.get(delta, {})
    if unknown := sorted(set(state) - {*_PER_ENTRY, *_SHARED}):
        raise TypeError(
            f"the states {', '.join(unknown)} of {type(optimizer).__name__} are not known: "
            "entries cannot be replaced"
        )
    values: dict[str, Tensor | float] = {}
    if seeds is not None and "exp_avg" in state:
        mean, mean_square, age = seeds
        group = next(g for g in optimizer.param_groups if any(p is delta for p in g["params"]))
        beta1, beta2 = (float(beta) for beta in group["betas"])
        age = age if "age" in state else float(state["step"])  # type: ignore[assignment]
        values["exp_avg"] = mean * (1 - beta1**age)
        values["exp_avg_sq"] = values["max_exp_avg_sq"] = mean_square * (1 - beta2**age)
        values["age"] = float(age)
    for name in _PER_ENTRY:
        if isinstance(state.get(name), Tensor):
            replaced.apply_(state[name], values.get(name, 0.0))
