"""One training step of a method: its model, its bytes, its seconds, and whether it trains."""

import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.measure import memory, timing
from bench.methods import METHODS, Budget, Method
from bench.steps.cases import FLOOR, Case

STEADY_STEPS = 3  # whose highest peak is the peak of a step
COUNTING_LR = 1e-2  # with which every trained number should move, norms in bf16 too
PERIODIC_STEPS, PERIODIC_SECONDS = 8, 4.0  # of periodic work: so many, but none after so long


class WrongMethod(RuntimeError):
    """A method does not train what it says, so its cost says nothing."""


def build(case: Case, budget: Budget, device: torch.device, lr: float) -> Method:
    """The method of `case` on a new model."""
    dtype = getattr(torch, case.dtype)
    model = case.shape.build(case.length, dtype, device, seed=budget.seed)
    return METHODS[case.method](model, budget, lr, case.options)


def random_batches(case: Case, device: torch.device) -> Iterator[Tensor]:
    """Batches of random tokens, int64 (batch, length), without end."""
    generator = torch.Generator().manual_seed(1)
    while True:
        size = (case.batch, case.length)
        yield torch.randint(case.shape.vocab, size, generator=generator).to(device)


def laps(method: Method, batch: Tensor, device: torch.device) -> list[float]:
    """Takes one step; seconds of zeroing, forward, backward, update."""
    loss: list[Tensor] = []
    forward, backward = lambda: loss.append(method.loss(batch)), lambda: loss.pop().backward()
    return timing.laps([method.zero_grad, forward, backward, method.update], device)


def periodic_seconds(
    method: Method, usual: list[list[float]], batches: Iterator[Tensor], device: torch.device
) -> float:
    """Seconds a step that go to the periodic work of `method`. usual: laps of steps without it."""
    if method.period is None:
        return 0.0
    due: list[float] = []
    while len(due) < PERIODIC_STEPS and sum(due) < PERIODIC_SECONDS:
        method.make_due()
        due.append(sum(laps(method, next(batches), device)))
    more = statistics.median(due) - statistics.median(map(sum, usual))
    return max(0.0, more) / method.period


def times(
    laps: list[list[float]], floors: list[float], paired: bool = True, periodic: float = 0.0
) -> dict:
    """What extra_info says of timed steps.

    laps: seconds of the parts of each step, or of each as one, where it is captured. floors: of the
    floor's steps; their median is that of each round where they were not paired with steps.
    periodic: seconds of periodic work a step.
    """
    steps = [sum(each) + periodic for each in laps]
    beside = floors if paired else [statistics.median(floors)] * len(steps)
    found = {
        "ratio_to_floor": timing.ratio(steps, beside),
        "floor_seconds": timing.quartiles(floors),
        "paired": paired,
    }
    if len(laps[0]) > 1:
        zeroing, forward, backward, update = map(statistics.median, zip(*laps, strict=True))
        parts = {"forward": forward, "backward": backward, "optimizer": zeroing + update}
        found["seconds"] = parts | {"periodic": periodic}
    return found


def check_loss(method: Method, batch: Tensor) -> None:
    """Raises WrongMethod where the loss is not finite."""
    if not bool(torch.isfinite(method.loss(batch))):
        raise WrongMethod(f"the loss of {method.name} is not finite after its timed steps")


def held_bytes(method: Method, batch: Tensor) -> dict[str, int | None]:
    """Bytes that a step holds: weights, gradients, optimizer, saved, unseen.

    saved and unseen wait for the backward (`memory.kept_by`). Both are None under torch.compile,
    which the counting would switch off.
    """
    method.zero_grad()
    saved = unseen = None
    if not method.options.compile:
        kept = memory.kept_by(lambda: method.loss(batch), method.model)
        saved, unseen = kept.saved, kept.unseen
    weights = memory.total_bytes(memory.model_tensors(method.model))
    method.loss(batch).backward()
    return {
        "weights": weights,
        "gradients": memory.total_bytes(memory.gradients(method.model)),
        "optimizer": memory.total_bytes(method.state_tensors()),
        "saved": saved,
        "unseen": unseen,
    }


def count(case: Case, budget: Budget, device: torch.device) -> dict:
    """Bytes and trained parameters of a step, on a model of its own.

    peak is the highest of STEADY_STEPS steps after the first. first_step_peak is that of the first
    step, in which the optimizer makes its state after the activations have gone. Both are all the
    bytes alive, with the weights.

    temporaries = peak - weights - optimizer - max(saved, gradients). Saved activations go as
    gradients come; a part of the smaller one can be alive at the peak, and is in the temporaries.

    Raises WrongMethod where a trained parameter does not move.
    """
    made: list[Method] = []
    before: dict[str, int] = {}

    def construct() -> None:
        made.append(build(case, budget, device, COUNTING_LR))
        before.update(checksums(made[0]))
        if bool(before) != (case.method != FLOOR):
            raise WrongMethod(f"{case.method} trains {', '.join(before) or 'nothing'}")

    batch = next(random_batches(case, device))
    steps = [lambda: made[0].step(batch)] * (1 + STEADY_STEPS)
    _, first, *steady = memory.peaks([construct, *steps], device)
    method = made[0]
    after = checksums(method)
    if still := [name for name, bits in before.items() if after.get(name) == bits]:
        raise WrongMethod(
            f"{method.name} trains {len(before) - len(still)} of its {len(before)} parameters; "
            f"not {', '.join(still[:3])}" + (", ..." if still[3:] else "")
        )
    held = held_bytes(method, batch)
    going = max(held["saved"] or 0, held["gradients"])
    temporaries = max(steady) - held["weights"] - held["optimizer"] - going
    peaks = {"temporaries": temporaries, "peak": max(steady), "first_step_peak": first}
    return {"trained_parameters": method.trained_parameters(), "bytes": held | peaks}


def checksums(method: Method) -> dict[str, int]:
    """A number for the bits of every trained parameter, by its name."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: int(parameter.detach().view(integers[parameter.itemsize]).sum())
        for name, parameter in method.named_trained()
    }
