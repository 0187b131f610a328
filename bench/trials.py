"""One problem of bench.tune: every candidate checked against fp64, then timed beside torch."""

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

from bench import report, timing
from bench.problems import OPS, Launch, Op, Problem, Results, candidates
from s2kernels.kernels import target, tuned

KERNELS = report.ROOT / "s2kernels" / "kernels"
SOURCES = ("fused_linear.py", "linear.py", "slice_grad.py", "swiglu.py", "tiles.py")
FINALISTS = 3
SCREENING_ROUNDS = {"cuda": 3, "cpu": 1}
FINAL_ROUNDS = {"cuda": 15, "cpu": 2}
LAP_SECONDS = 2e-3  # of one measured lap on a GPU, in which the launches are repeated
OPERAND_BYTES = 2**28  # so many in turn, that no launch finds its operands in the L2 cache


class Late(Exception):
    """The budget is spent."""


class Clock:
    def __init__(self, budget: float):
        self.end = time.monotonic() + budget

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise Late


def measure(problem: Problem, device: torch.device, toy: bool, clock: Clock) -> dict:
    """The entry of a problem in the shape of pytest-benchmark's JSON.

    A launch with a wrong result, or that fails for any reason but too little shared memory, is
    listed as such and takes no part: it is an error of a kernel or of a compiler, for which main
    returns 1.

    Raises Late when it is late, RuntimeError where no launch is right, and whatever a lost GPU
    raises.
    """
    op = OPS[problem.op]
    copies = operands(problem, op, device)
    allowed = allowance(op, copies[0])
    count = launches_in_a_lap(op, copies, device)
    launches = candidates(problem, toy)
    runs = [with_launch(op, problem, launch, device) for launch in launches]
    compile_together(runs, copies[0], device)
    screened: dict[int, float] = {}
    refused = []
    for number, (launch, run) in enumerate(zip(launches, runs, strict=True)):
        clock.check()
        try:
            if wrong := errors(run(*copies[0]), allowed):
                refused.append({"launch": launch, "wrong": True, "why": wrong})
                continue
            step = lap(run, copies, count, device)
            screened[number] = min(timing.laps([step] * SCREENING_ROUNDS[device.type], device))
        except OutOfResources as error:
            refused.append({"launch": launch, "wrong": False, "why": str(error)})
        except Exception as error:
            timing.synchronize(device)  # raises again what broke the GPU
            refused.append({"launch": launch, "wrong": True, "why": in_words(error)})
    if not screened:
        raise RuntimeError(f"{problem.name}: no launch is right: {refused}")

    clock.check()
    best = sorted(screened, key=screened.__getitem__)[:FINALISTS]
    steps = {"torch": lap(op.torch, copies, count, device)}
    for number in sorted({0, *best} & screened.keys()):
        steps[str(number)] = lap(runs[number], copies, count, device)
    seconds = interleaved(steps, FINAL_ROUNDS[device.type], device)
    seconds = {name: [value / count for value in values] for name, values in seconds.items()}

    chosen = choose({name: values for name, values in seconds.items() if name != "torch"})
    ratio = timing.quartiles(timing.paired_ratios(seconds[chosen], seconds["torch"]))
    chip = target.chip(device)
    info = {
        "device": chip.name,
        "arch": chip.arch,
        "source": source_hash(),
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
    return {
        "group": "tune",
        "name": problem.name,
        "fullname": f"bench/tune.py::{problem.name}",
        "params": {"op": problem.op},
        "stats": stats,
        "extra_info": info,
    }


def failure(problem: Problem, why: str) -> dict:
    return entry(problem, None, {"source": source_hash(), "why": why})


def is_failure(entry: dict) -> bool:
    return entry["stats"] is None


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
    ratio = timing.quartiles(timing.paired_ratios(seconds[fastest], seconds["0"]))
    return fastest if below_one(ratio) else "0"


def below_one(ratio: dict) -> bool:
    """Whether a ratio of times is below 1 by more than its spread."""
    return ratio["median"] + ratio["iqr"] < 1


def operands(problem: Problem, op: Op, device: torch.device) -> list[tuple]:
    """So many sets of them that one after the other leave nothing in the L2 cache."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=problem.dtype)

    first = op.operands(problem, randn)
    size = sum(operand.nbytes for operand in first)
    copies = 1 if device.type == "cpu" else max(1, min(16, OPERAND_BYTES // size))
    return [first, *(op.operands(problem, randn) for _ in range(copies - 1))]


def allowance(op: Op, arguments: tuple) -> list[tuple[Tensor, float]]:
    """(exact result, largest error allowed), per output: twice that of torch, and one rounding."""
    exact = op.exact(*(argument.double() for argument in arguments))
    return [
        (
            value,
            2 * (eager.double() - value).abs().max().item()
            + torch.finfo(eager.dtype).eps * value.abs().max().item(),
        )
        for value, eager in zip(exact, op.torch(*arguments), strict=True)
    ]


def errors(results: Results, allowed: list[tuple[Tensor, float]]) -> str:
    """What is wrong with the results, in words; nothing if they are as accurate as torch's."""
    found = ""
    for number, (actual, (exact, bound)) in enumerate(zip(results, allowed, strict=True)):
        error = (actual.double() - exact).abs().max().item()
        if not error <= bound:  # NaN is no small error either
            found += f"output {number}: error {error:.3g} against fp64, allowed {bound:.3g}. "
    return found.strip()


def with_launch(op: Op, problem: Problem, launch: Launch, device: torch.device) -> Callable:
    """op.triton with `launch` for what was measured; an empty one stands for the default."""
    dtype = "float32" if problem.dtype == torch.float32 else "half"
    key = target.chip(device).arch, problem.op, dtype
    table = {key: {problem.sizes: {problem.tokens: launch}}}

    def run(*arguments):
        with patch.dict(tuned.LAUNCH, table, clear=True):
            return op.triton(*arguments)

    return run


def launches_in_a_lap(op: Op, copies: list[tuple], device: torch.device) -> int:
    """So many that a lap of torch takes LAP_SECONDS on a GPU; one on CPU."""
    if device.type == "cpu":
        return 1
    op.torch(*copies[0])
    (once,) = timing.laps([lambda: op.torch(*copies[-1])], device)
    return max(len(copies), round(LAP_SECONDS / max(once, 1e-6)))


def lap(run: Callable, copies: list[tuple], count: int, device: torch.device) -> Callable:
    """Runs `count` times, on one set of operands after another, as a graph on a GPU: what the host
    takes for a launch is then in no one's time.
    """

    def plain() -> None:
        for number in range(count):
            run(*copies[number % len(copies)])

    plain()  # compiles, and warms up
    if device.type == "cpu":
        return plain
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain()
    return graph.replay


def interleaved(steps: dict[str, Callable], rounds: int, device: torch.device) -> dict:
    """Seconds of a lap by name, one a round; a first round warms up and is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        names = timing.order(list(steps), round_)
        times = timing.laps([steps[name] for name in names], device)
        for name, value in zip(names, times, strict=True):
            if round_ > 0:
                seconds[name].append(value)
    return seconds


def source_hash() -> str:
    """Of the kernels and of what compiles them: other code, other times."""
    digest = hashlib.sha256(f"{torch.__version__} {triton.__version__}".encode())
    for name in SOURCES:
        digest.update((KERNELS / name).read_bytes())
    return digest.hexdigest()[:16]
