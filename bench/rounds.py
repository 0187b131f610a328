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
from bench.visits import Visit

WARM_UP = 2  # steps before the clock: compilation, first allocations, the optimizer's state
TIMING_LR = 1e-6  # with which the model stays what it is however many rounds there are
PERIODIC_STEPS, PERIODIC_SECONDS = 8, 4.0  # of periodic work: so many, but none after so long
# Rounds, and seconds at the least, after which a slow floor is believed.
PROBED, PROBED_SECONDS = 3, 0.5


class Disturbed(RuntimeError):
    """The machine is slower than it was."""


class Cramped(RuntimeError):
    """The allocator had to give memory back and take it anew within timed steps."""


def visit(case: Case, budget: Budget, setup: Setup, limit: float = math.inf) -> Visit:
    """Times of `case` in rounds with a floor of its own, or alone where two models do not fit.

    Raises Disturbed, and soon, where the floor takes longer than `limit` seconds.
    """
    began = time.perf_counter()
    try:
        run, floor = time_rounds([case, case.floor()], budget, setup, limit)
        paired = True
    except Exception as error:
        if not (isinstance(error, Cramped) or out_of_memory(error)):
            raise
        paired = False
    if not paired:
        # Not in the handler: its traceback keeps the two models alive. The floor right before, each
        # time: the clocks of a device are not what they were some cases ago.
        release(setup.device)
        (floor,) = time_rounds([case.floor()], budget, setup, limit)
        release(setup.device)
        (run,) = time_rounds([case], budget, setup)
    took = time.perf_counter() - began
    return Visit(run.laps, [sum(lap) for lap in floor.laps], run.periodic, paired, took)


@dataclass(frozen=True)
class _Run:
    laps: list[list[float]]  # seconds of zeroing, forward, backward, update, by round
    periodic: float  # share of a step, in seconds


def time_rounds(
    cases: list[Case], budget: Budget, setup: Setup, limit: float = math.inf
) -> list[_Run]:
    """Fresh models of `cases` take a step each a round, on one batch, until setup.precision.

    What decides is the ratio of the first to the last, or the seconds of one alone. Steps with
    periodic work are made and not timed: `periodic_share` has it.

    Raises Disturbed where the median step of the last is above `limit` seconds at the first look,
    and Cramped where two models leave the allocator of a GPU so little that steps wait for it.
    """
    device = setup.device
    methods = [build(case, budget, device, TIMING_LR) for case in cases]
    batches = random_batches(cases[0], device)
    for _ in range(WARM_UP):
        batch = next(batches)
        for method in methods:
            step_laps(method, batch, device)

    cramped = retries(device)
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
    if len(methods) > 1 and retries(device) > cramped:
        raise Cramped(f"{methods[0].name} beside its floor")
    if not bool(torch.isfinite(methods[0].loss(batch))):
        raise WrongMethod(f"the loss of {methods[0].name} is not finite after its timed steps")
    return [
        _Run(of_steps, periodic_share(method, of_steps, batches, device))
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


def retries(device: torch.device) -> int:
    """How often the caching allocator of a GPU has freed what it kept to find room; else 0."""
    return torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0
