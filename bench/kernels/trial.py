"""One problem of the tuner: every candidate checked against fp64, then timed beside torch."""

import hashlib
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bench.kernels import laps
from bench.kernels.candidates import Launch, Problem, candidates, peer, programs
from bench.measure import timing
from s2kernels import kernels, reference
from s2kernels.kernels import target, tuned

SOURCES = ("fused_linear.py", "linear.py", "slice_grad.py", "swiglu.py", "tiles.py")
FINALISTS = 3
SCREENING_ROUNDS = {"cuda": 3, "cpu": 1}
FINAL_ROUNDS = {"cuda": 15, "cpu": 2}
COMPILE_SECONDS = 1.0  # of a CPU core for one launch: 0.6 to 1.4 were measured


class Late(Exception):
    """The budget is spent."""


def check_time(end: float, needed: float = 0.0) -> None:
    """Raises Late in the place of what takes `needed` seconds and would end after `end`."""
    if time.monotonic() + needed > end:
        raise Late


def measure(problem: Problem, device: torch.device, toy: bool, end: float) -> dict:
    """The entry of a problem in the shape of pytest-benchmark's JSON.

    A launch with a wrong result, or that fails for any reason but too little shared memory, is
    listed as such and takes no part: it is an error of a kernel or of a compiler.

    Raises Late before it is late, with what compiling will take; RuntimeError where no launch is
    right; and whatever a lost GPU raises.
    """
    launches = candidates(problem, toy)
    if device.type == "cuda":
        check_time(end, programs(launches) * COMPILE_SECONDS / (os.cpu_count() or 1))
    torch.manual_seed(0)
    sets = laps.operand_sets(lambda: problem.operands(device), device)
    by_torch = peer(problem.op)
    allowed = allowance(problem.op, sets[0])
    count = laps.launches_in_a_lap(by_torch, sets, device)
    runs = [with_launch(problem, launch, device) for launch in launches]
    compile_together(runs, sets[0], device)
    screened: dict[int, float] = {}
    refused = []
    for number, (launch, run) in enumerate(zip(launches, runs, strict=True)):
        check_time(end)
        try:
            if wrong := errors(run(*sets[0]), allowed):
                refused.append({"launch": launch, "wrong": True, "why": wrong})
                continue
            lap = laps.lap(run, sets, count, device)
            screened[number] = min(timing.laps([lap] * SCREENING_ROUNDS[device.type], device))
        except OutOfResources as error:
            refused.append({"launch": launch, "wrong": False, "why": str(error)})
        except Exception as error:
            timing.synchronize(device)  # raises again what broke the GPU
            refused.append({"launch": launch, "wrong": True, "why": in_words(error)})
    if not screened:
        raise RuntimeError(f"{problem.name}: no launch is right: {refused}")

    check_time(end)
    best = sorted(screened, key=screened.__getitem__)[:FINALISTS]
    compared = {"torch": laps.lap(by_torch, sets, count, device)}
    for number in sorted({0, *best} & screened.keys()):
        compared[str(number)] = laps.lap(runs[number], sets, count, device)
    # The first round warms up.
    _, *rounds = timing.interleave(compared, 1 + FINAL_ROUNDS[device.type], device)
    seconds = {name: [each[name] / count for each in rounds] for name in compared}

    chosen = choose({name: values for name, values in seconds.items() if name != "torch"})
    ratio = timing.ratio(seconds[chosen], seconds["torch"])
    chip = target.chip(device)
    info = {
        "device": chip.name,
        "arch": chip.arch,
        "op": problem.op,
        "sizes": list(problem.sizes),
        "tokens": problem.tokens,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "launch": launches[int(chosen)],
        "ratio_to_torch": ratio,
        "wins": below_one(ratio),
        "torch": timing.stats(seconds["torch"]),
        "screened": {words(launches[number]): value / count for number, value in screened.items()},
        "refused": refused,
    }
    return entry(problem, timing.stats(seconds[chosen]), info)


def entry(problem: Problem, stats: dict | None, info: dict) -> dict:
    """The entry of `problem` in the JSON; info: its extra_info, stats: None where it failed."""
    names = {"group": "tune", "name": problem.name, "fullname": problem.fullname}
    return names | {"params": {"op": problem.op}, "stats": stats, "extra_info": info}


def failure(problem: Problem, why: str) -> dict:
    return entry(problem, None, {"why": why})


def words(launch: Launch) -> str:
    return " ".join(f"{name}={value}" for name, value in launch.items()) or "default"


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


def outputs(result: Tensor | tuple) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]


def allowance(op: str, arguments: tuple) -> list[tuple[Tensor, float]]:
    """(exact result, largest error allowed), per output: twice that of torch, and one rounding."""
    doubled = [x.double() if isinstance(x, Tensor) else x for x in arguments]
    exact, eager = (
        outputs(f(*a)) for f, a in ((getattr(reference, op), doubled), (peer(op), arguments))
    )
    return [
        (
            value,
            2 * (found.double() - value).abs().max().item()
            + torch.finfo(found.dtype).eps * value.abs().max().item(),
        )
        for value, found in zip(exact, eager, strict=True)
    ]


def errors(result: Tensor | tuple, allowed: list[tuple[Tensor, float]]) -> str:
    """What is wrong with the results, in words; nothing if they are as accurate as torch's."""
    found = []
    for number, (actual, (exact, bound)) in enumerate(zip(outputs(result), allowed, strict=True)):
        error = (actual.double() - exact).abs().max().item()
        if not error <= bound:  # NaN is no small error either
            found.append(f"output {number}: error {error:.3g} against fp64, allowed {bound:.3g}")
    return "; ".join(found)


def with_launch(problem: Problem, launch: Launch, device: torch.device) -> Callable:
    """The kernel with `launch` for what was measured; an empty one stands for the default."""
    dtype = "float32" if problem.dtype == torch.float32 else "half"
    key = target.chip(device).arch, problem.op, dtype
    table = {key: {problem.sizes: {problem.tokens: launch}}}

    def run(*arguments):
        with patch.dict(tuned.LAUNCH, table, clear=True):
            return getattr(kernels, problem.op)(*arguments)

    return run


def source_hash() -> str:
    """Of the kernels and of what compiles them: other code, other times. Not of tuned.json."""
    digest = hashlib.sha256(f"{torch.__version__} {triton.__version__}".encode())
    for name in SOURCES:
        digest.update((tuned.PATH.parent / name).read_bytes())
    return digest.hexdigest()[:16]
