"""A training step of every method beside the frozen floor: pytest bench/steps

Each case is counted on one model, then timed on another. A round is a step of the method and a step
of the floor on the same batch, either one first in turn; the ratios of the rounds are what counts.
The floor beside an identical floor says how far they can be trusted.
"""

from dataclasses import asdict

import pytest
import torch

from bench.measure import machine
from bench.methods import Budget, Unavailable, comparable
from bench.steps import step
from bench.steps.cases import Case, suite

WARM_UP = 2  # steps before the clock: compilation, first allocations, the optimizer's state
TIMING_LR = 1e-6  # the model stays as it is
ROUNDS = (8, 60)  # at least and at most
SECONDS = {"full": 5.0, "short": 20.0, "toy": 0.0}  # of timed rounds, within ROUNDS
PAIRED_MEMORY = 0.9  # of a GPU's, that a method and its floor may take together


def pytest_generate_tests(metafunc):
    cases = suite(metafunc.config.option.suite, machine.default_device().type)
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def bench_step(benchmark, case: Case, device: torch.device, request):
    measure(benchmark, case, device, SECONDS[request.config.option.suite])


def measure(benchmark, case: Case, device: torch.device, seconds: float) -> None:
    """Counts and times `case`; skips the test, with the status, where it cannot run here."""
    budget = comparable(case.shape.config(case.length), share=case.share)
    benchmark.group = "/".join(case.id.split("/")[:3])
    benchmark.params = case.params()
    benchmark.extra_info.update(
        total_parameters=case.shape.parameters(), budget=asdict(budget), status="measured"
    )
    machine.release(device)
    if case.options.compile:
        torch.compiler.reset()  # else earlier models count against the limit of recompilations
    status = None
    try:
        benchmark.extra_info.update(step.count(case, budget, device))
        machine.release(device)
        benchmark.extra_info.update(time_rounds(benchmark, case, budget, device, seconds))
    except Unavailable as reason:
        status = f"unavailable: {reason}"
    except Exception as error:
        if not machine.out_of_memory(error):
            raise
        status = "out of memory"
    if status is not None:  # a result, too; skipped here, where no traceback holds the models
        benchmark.extra_info["status"] = status
        pytest.skip(status)


def time_rounds(
    benchmark, case: Case, budget: Budget, device: torch.device, seconds: float
) -> dict:
    """Times `case` in rounds with its floor; what extra_info says of them.

    Where the two do not fit on the GPU together, the floor is timed alone first, and its median is
    that of every round. Steps with periodic work are taken between the rounds, and each round gets
    its share of that work.
    """
    method_laps: list[list[float]] = []
    floor_seconds: list[float] = []
    paired = fit_together(benchmark.extra_info["bytes"]["peak"], device)
    batches = step.random_batches(case, device)

    floor = step.build(case.floor(), budget, device, TIMING_LR)
    for _ in range(WARM_UP):
        floor_took = sum(step.laps(floor, next(batches), device))
    if not paired:
        for _ in range(ROUNDS[0]):
            floor_seconds.append(sum(step.laps(floor, next(batches), device)))
        floor = None
        machine.release(device)
    method = step.build(case, budget, device, TIMING_LR)
    for _ in range(WARM_UP):
        took = floor_took + sum(step.laps(method, next(batches), device))

    def floor_in_turn(batch: torch.Tensor) -> None:
        """Before the method in one round, after it in the next."""
        if floor is not None and len(method_laps) % 2 == 0:
            floor_seconds.append(sum(step.laps(floor, batch, device)))

    def before_method():
        batch = next(batches)
        while method.is_due():
            method.step(batch)
        floor_in_turn(batch)
        return (batch,), {}

    benchmark.pedantic(
        lambda batch: method_laps.append(step.laps(method, batch, device)),
        setup=before_method,
        teardown=floor_in_turn,
        rounds=min(max(ROUNDS[0], int(seconds / took)), ROUNDS[1]),
    )
    step.check_loss(method, next(batches))
    if benchmark.disabled:
        return {}
    periodic = step.periodic_seconds(method, method_laps, batches, device)
    return step.times(method_laps, floor_seconds, paired, periodic)


def fit_together(peak: int, device: torch.device) -> bool:
    """Whether a method of this peak and its floor surely fit on the GPU together."""
    if device.type != "cuda":
        return True
    total = torch.cuda.get_device_properties(device).total_memory
    return 2 * peak <= PAIRED_MEMORY * total
