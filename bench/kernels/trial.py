"""One problem of the tuner: every candidate checked against fp64, then timed beside torch."""

import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bench.kernels import laps
from bench.kernels.candidates import PEERS, Launch, Problem, candidates
from bench.measure import timing
from bench.measure.memory import tensors_in
from s2kernels import kernels, reference
from s2kernels.kernels import target, tuned

ROUNDS = {"cuda": 8, "cpu": 2}


def measure(problem: Problem, device: torch.device, toy: bool) -> dict:
    """The entry of a problem in the file of results.

    A launch with a wrong result, or that fails for any reason but too little shared memory, is
    listed as such and takes no part: it is an error of a kernel or of a compiler.

    Raises RuntimeError where no launch is right, and whatever a lost GPU raises.
    """
    launches = candidates(problem, toy)
    torch.manual_seed(0)
    sets = laps.operand_sets(lambda: problem.operands(device), device)
    by_torch = PEERS[problem.op]
    allowed = allowance(problem.op, sets[0])
    count = laps.launches_in_a_lap(by_torch, sets, device)
    runs = [with_launch(problem, launch, device) for launch in launches]
    compile_together(runs, sets[0], device)
    timed = {"torch": laps.lap(by_torch, sets, count, device)}
    refused = []
    for number, run in enumerate(runs):
        try:
            check(run(*sets[0]), allowed)
            timed[str(number)] = laps.lap(run, sets, count, device)
        except Exception as error:
            timing.synchronize(device)  # raises again what broke the GPU
            wrong = not isinstance(error, OutOfResources)
            refused.append({"launch": launches[number], "wrong": wrong, "why": in_words(error)})
    if len(timed) == 1:
        raise RuntimeError(f"{problem.name}: no launch is right: {refused}")

    _, *rounds = timing.interleave(timed, 1 + ROUNDS[device.type], device)  # the first warms up
    seconds = {name: [each[name] / count for each in rounds] for name in timed}
    torch_seconds = seconds.pop("torch")
    chosen = choose(seconds)
    ratio = timing.ratio(seconds[chosen], torch_seconds)
    chip = target.chip(device)
    return entry(
        problem,
        timing.stats(seconds[chosen]),
        device=chip.name,
        arch=chip.arch,
        op=problem.op,
        sizes=list(problem.sizes),
        tokens=problem.tokens,
        dtype=str(problem.dtype).removeprefix("torch."),
        launch=launches[int(chosen)],
        ratio_to_torch=ratio,
        wins=below_one(ratio),
        refused=refused,
    )


def entry(problem: Problem, stats: dict | None, **info: object) -> dict:
    """The entry of `problem`, with the names of pytest-benchmark. stats: None where it failed."""
    return {"name": problem.name, "fullname": problem.name, "stats": stats, "extra_info": info}


def in_words(error: Exception) -> str:
    """Its type, and where it has a message the first line of that."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def compile_together(runs: list[Callable], arguments: tuple, device: torch.device) -> None:
    """Has Triton compile what `runs` would launch on a GPU, on all cores at once.

    What fails here is left to fail when it is tried.
    """
    if device.type == "cpu":  # interpreted
        return
    launch = triton.runtime.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        return launch(kernel, *args, grid=grid, warmup=True, **options)

    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        triton.AsyncCompileMode(threads, ignore_errors=True),
        patch.object(triton.runtime.JITFunction, "run", compile_only),
    ):
        for run in runs:
            with suppress(Exception):
                run(*arguments)


def choose(seconds: dict[str, list[float]]) -> str:
    """The fastest; but the default, "0", where that is not faster by more than the spread."""
    fastest = min(seconds, key=lambda name: statistics.median(seconds[name]))
    if "0" not in seconds:
        return fastest
    return fastest if below_one(timing.ratio(seconds[fastest], seconds["0"])) else "0"


def below_one(ratio: dict) -> bool:
    """Whether a ratio of times is below 1 by more than its spread."""
    return ratio["median"] + ratio["iqr"] < 1


def allowance(op: str, arguments: tuple) -> list[tuple[Tensor, float]]:
    """(exact result, largest error allowed), per output: twice that of torch, and one rounding."""
    doubled = [x.double() if isinstance(x, Tensor) else x for x in arguments]
    allowed = []
    outputs = tensors_in(getattr(reference, op)(*doubled)), tensors_in(PEERS[op](*arguments))
    for exact, by_torch in zip(*outputs, strict=True):
        error = (by_torch.double() - exact).abs().max().item()
        rounding = torch.finfo(by_torch.dtype).eps * exact.abs().max().item()
        allowed.append((exact, 2 * error + rounding))
    return allowed


def check(result: Tensor | tuple, allowed: list[tuple[Tensor, float]]) -> None:
    """Raises AssertionError, on one line, where the results are less accurate than allowed."""
    for actual, (exact, error) in zip(tensors_in(result), allowed, strict=True):
        torch.testing.assert_close(
            actual.double(), exact, rtol=0, atol=error, msg=lambda said: " ".join(said.split())
        )


def with_launch(problem: Problem, launch: Launch, device: torch.device) -> Callable:
    """The kernel with `launch` for what was measured; an empty one stands for the default."""
    key = target.chip(device).arch, problem.op, "half"  # all problems are in 16 bits
    table = {key: {problem.sizes: {problem.tokens: launch}}}
    return patch.dict(tuned.LAUNCH, table, clear=True)(getattr(kernels, problem.op))
