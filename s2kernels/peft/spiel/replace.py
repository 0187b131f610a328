"""One reselection in one layer: which entries go, which come, and what moves along with them.

An entry sits in a slot, its place in `index`. As `index` is sorted, new entries shift the others:
all that is kept per entry, the optimizer's states included, is moved by one `Replacement`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from s2kernels.optim import SM3, AgedAdamW

# States that are per entry, and 0 for one that has no history; then those of the whole weight, or
# of no entry in particular. Anything else would be moved wrongly, or not at all.
_PER_ENTRY = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "age", "momentum_buffer")
_SHARED = ("row", "col", "step")


@dataclass(frozen=True)
class Replacement:
    """What a reselection does to the k entries of a layer.

    index   (k,) the positions from then on, sorted
    kept    (k - r,) slots of the entries that stay, int64, ascending
    grown   (r,) the new positions, sorted
    order   (k,) int64: slot e is filled from place order[e] of the kept and then the grown ones
    """

    index: Tensor
    kept: Tensor
    grown: Tensor
    order: Tensor

    def apply_(self, values: Tensor, of_grown: Tensor | float = 0.0) -> None:
        """Move the values (k,) with their entries, in place; new entries get of_grown, (r,)."""
        new = values.new_empty(len(self.grown))
        new[:] = of_grown
        values.copy_(torch.cat([values[self.kept], new])[self.order])


def replacement(index: Tensor, dropped: Tensor, chosen: Tensor) -> Replacement:
    """Entries for which `dropped`, bool (k,), is true give way to those at `chosen`.

    chosen: as many positions, sorted, none of them that of an entry which stays. One that is
    dropped and chosen at the same time is left as it is.
    """
    regrown = dropped & torch.isin(index, chosen)
    grown = chosen[~torch.isin(chosen, index)]
    kept = (~dropped | regrown).nonzero().squeeze(1)
    positions, order = torch.cat([index[kept], grown]).sort()
    return Replacement(positions, kept, grown, order)


def smallest(delta: Tensor, num: int) -> Tensor:
    """Bool (k,), true for the num deltas of least magnitude; of equal ones those at the front."""
    mask = torch.zeros_like(delta, dtype=torch.bool)
    mask[delta.detach().abs().sort(stable=True).indices[:num]] = True
    return mask


def best_free(candidates: Tensor, scores: Tensor, staying: Tensor, num: int) -> Tensor:
    """The num candidates of highest score that are not in `staying`, sorted; all of them sorted.

    scores: (m,) of the candidates, not negative. Of equal ones those of lowest position.
    """
    taken = torch.isin(candidates, staying)
    assert num <= len(candidates) - len(staying), "as many candidates as entries are wanted"
    ranked = scores.masked_fill(taken, -1).sort(descending=True, stable=True).indices
    return candidates[ranked[:num].sort().values]


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
    correction, which divides by 1 - beta^age, turns into these means. Age is that number of steps
    with AgedAdamW; with torch's Adam and AdamW the step count that all entries share, so that the
    means weigh as much as the whole history of an old entry.

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
