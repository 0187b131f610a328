"""Times of a case: steps of fresh models, one of each a round, in turns with the frozen floor's.

Tokens are random, a new batch every timed step.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import timing
from bench.cases import Case
from bench.fresh import Setup, WrongMethod, build, out_of_memory, random_batches, release
from bench.methods import Budget, Method

WARM_UP = 2  # steps before the clock: compilation, first allocations, the optimizer's state
TIMING_LR = 1e-6  # with which the model stays what it is however many rounds there are
PERIODIC_STEPS, PERIODIC_SECONDS = 15, 5.0  # of periodic work: so many, but none after so long
PARTS = ("forward", "backward", "optimizer")
# Rounds, and seconds at the least, after which a slow floor is believed.
PROBED, PROBED_SECONDS = 5, 0.5


class Disturbed(RuntimeError):
    """The machine is slower than it was."""


@dataclass(frozen=True)
class Times:
    """Seconds of every timed step, its share of periodic work in them, and the parts of a step.

    floor: seconds of every timed step of the floor.
    ratios: to the floor's step in the same round if paired, else to the floor's median.
    """

    seconds: list[float]
    floor: list[float]
    ratios: list[float]
    parts: dict[str, float]  # medians; "periodic" is the share of one step
    paired: bool


def time_beside_floor(case: Case, budget: Budget, setup: Setup, limit: float = math.inf) -> Times:
    """Times of `case` in rounds with a floor of its own, or alone where two models do not fit.

    Raises Disturbed, and soon, where the floor takes longer than `limit` seconds.
    """
    try:
        times, floor = time_rounds([case, case.floor()], budget, setup, limit)
        paired = True
    except Exception as error:
        if not out_of_memory(error):
            raise
        paired = False
    if paired:
        ratios = timing.paired_ratios(times.seconds, floor.seconds)
        return Times(times.seconds, floor.seconds, ratios, times.parts, paired)
    release(setup.device)  # not in the handler: its traceback keeps the two models alive
    # Right before, each time: the clocks of a device are not what they were some cases ago.
    (floor,) = time_rounds([case.floor()], budget, setup, limit)
    release(setup.device)
    (times,) = time_rounds([case], budget, setup)
    reference = statistics.median(floor.seconds)
    ratios = [s / reference for s in times.seconds]
    return Times(times.seconds, floor.seconds, ratios, times.parts, paired)


@dataclass(frozen=True)
class _Run:
    seconds: list[float]
    parts: dict[str, float]


def time_rounds(
    cases: list[Case], budget: Budget, setup: Setup, limit: float = math.inf
) -> list[_Run]:
    """Fresh models of `cases` take a step each a round, on one batch, until setup.precision.

    What decides is the ratio of the first to the last, or the seconds of one alone. Steps with
    periodic work are made and not timed: `periodic_share` has it.

    Raises Disturbed where the median step of the last is above `limit` seconds at the first look.
    """
    device = setup.device
    methods = [build(case, budget, device, TIMING_LR) for case in cases]
    batches = random_batches(cases[0], device)
    for _ in range(WARM_UP):
        batch = next(batches)
        for method in methods:
            step_laps(method, batch, device)

    laps: list[list[list[float]]] = [[] for _ in methods]
    places = [str(place) for place in range(len(methods))]
    began = time.perf_counter()
    decisive: list[float] = []
    while not setup.precision.reached(decisive, time.perf_counter() - began):
        batch = next(batches)
        if due := [method for method in methods if method.is_due()]:
            for method in due:
                method.step(batch)
            continue
        for place in map(int, timing.order(places, len(decisive))):
            laps[place].append(step_laps(methods[place], batch, device))
        first, last = sum(laps[0][-1]), sum(laps[-1][-1])
        decisive.append(first / last if len(methods) > 1 else first)
        if (
            limit < math.inf
            and len(decisive) >= PROBED
            and time.perf_counter() - began >= PROBED_SECONDS
        ):
            if statistics.median(map(sum, laps[-1])) > limit:
                raise Disturbed(f"a step of the floor takes longer than {limit:.3g} s")
            limit = math.inf
    if not bool(torch.isfinite(methods[0].loss(batch))):
        raise WrongMethod(f"the loss of {methods[0].name} is not finite after its timed steps")
    return [
        summary(of_steps, periodic_share(method, of_steps, batches, device))
        for method, of_steps in zip(methods, laps, strict=True)
    ]


def step_laps(method: Method, batch: Tensor, device: torch.device) -> list[float]:
    """One step of `method`; seconds of zeroing, forward, backward, update."""
    loss: list[Tensor] = []
    parts: list[Callable[[], object]] = [
        method.zero_grad,
        lambda: loss.append(method.loss(batch)),
        lambda: method.backward(loss.pop()),
        method.update,
    ]
    return timing.laps(parts, device)


def periodic_share(
    method: Method, laps: list[list[float]], batches: Iterator[Tensor], device: torch.device
) -> float:
    """Seconds of a step that go to what the method does every `period` steps only."""
    if method.period is None:
        return 0.0
    usual = statistics.median(map(sum, laps))
    due: list[float] = []
    while len(due) < PERIODIC_STEPS and sum(due) < PERIODIC_SECONDS:
        method.make_due()
        due.append(sum(step_laps(method, next(batches), device)))
    return max(0.0, statistics.median(due) - usual) / method.period


def summary(laps: list[list[float]], periodic: float) -> _Run:
    medians = [statistics.median(of_part) for of_part in zip(*laps, strict=True)]
    zeroing, forward, backward, update = medians
    parts = dict(zip(PARTS, (forward, backward, zeroing + update), strict=True))
    return _Run([sum(lap) + periodic for lap in laps], parts | {"periodic": periodic})
