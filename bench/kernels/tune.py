"""Finds the fastest launch of every kernel at the shapes of real models, on the GPU at hand.

    python -m bench.kernels.tune [--budget-s 1200] [--ops slice_grad linear ...] [--dry-run]

For each problem every candidate is checked against fp64 before it is timed, and the best few are
timed once more beside torch in interleaved rounds. The results are kept in
bench/results/<device>/tune.json after each problem, so that a run that ends early goes on where it
stopped. Then the fastest launches, and the shapes at which Triton beat torch by more than the
spread, are written into s2kernels/kernels/tuned.json, which every process reads that starts later.

Returns 1 if a launch gave a wrong result or did not run, other than for want of shared memory, or
if a problem failed: the others are measured all the same, and it comes last in the next run.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from bench.kernels import laps
from bench.kernels.candidates import OPS, Launch, Problem, candidates, peer, problems, programs
from bench.measure import machine, results, timing
from s2kernels import kernels, reference
from s2kernels.files import replacing
from s2kernels.kernels import target, tuned

SOURCES = ("fused_linear.py", "linear.py", "slice_grad.py", "swiglu.py", "tiles.py")
FINALISTS = 3
SCREENING_ROUNDS = {"cuda": 3, "cpu": 1}
FINAL_ROUNDS = {"cuda": 15, "cpu": 2}
COMPILE_SECONDS = 1.0  # of a CPU core for one launch: 0.6 to 1.4 were measured


class Late(Exception):
    """The budget is spent."""


class Clock:
    """Raises Late in the place of what would end after the budget."""

    def __init__(self, budget: float) -> None:
        self.end = time.monotonic() + budget

    def check(self, needed: float = 0.0) -> None:
        if time.monotonic() + needed > self.end:
            raise Late


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = machine.default_device()
    ops = [op for op in args.ops if op == "slice_grad" or target.has_descriptors(device)]
    if skipped := sorted(set(args.ops) - set(ops)):
        print(f"{target.chip(device).arch} has no descriptor kernels: no {', '.join(skipped)}")
    listed = problems(ops, args.toy)
    if args.dry_run:
        for problem in listed:
            print(f"{problem.name}: {len(candidates(problem, args.toy))} candidates")
        return 0
    if device.type == "cpu" and not (args.toy and triton.knobs.runtime.interpret):
        print("the tuner measures a GPU; without one it rehearses: TRITON_INTERPRET=1, and --toy")
        return 2

    path = args.results / machine.device_name(device) / "tune.json"
    entries = measured_before(path)
    try:
        measure_missing(listed, entries, path, device, args)
    finally:
        write_table(args.table, list(entries.values()))
    print(results.table(summary(entries)))
    wrong = sorted(complaints(entries))
    print("\n".join(["WRONG OR FAILED", *wrong] if wrong else []))
    return 1 if wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.tune", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--budget-s", type=float, default=1200.0, help="seconds (default 1200)")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP")
    parser.add_argument("--dry-run", action="store_true", help="list the problems, measure nothing")
    parser.add_argument("--toy", action="store_true", help="a rehearsal at tiny shapes")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--table", type=Path, default=tuned.PATH, help="the file that is renewed")
    args = parser.parse_args(argv)
    if args.toy and (args.table == tuned.PATH or args.results == results.FOLDER):
        parser.error("--toy needs --results and --table: its numbers mean nothing")
    return args


def measured_before(path: Path) -> dict[str, dict]:
    """The entries of `path` that were measured with the kernels as they are, by name."""
    if not path.exists():
        return {}
    entries = results.read(path)["benchmarks"]
    return {
        entry["name"]: entry for entry in entries if entry["extra_info"]["source"] == source_hash()
    }


def measure_missing(
    listed: list[Problem],
    entries: dict[str, dict],
    path: Path,
    device: torch.device,
    args: argparse.Namespace,
) -> None:
    """Measures what `entries` lacks of `listed`, then what failed before, into both and `path`.

    Raises what a lost GPU raises: nothing more can be measured in this process.
    """
    failed = {name for name, entry in entries.items() if is_failure(entry)}
    left = [problem for problem in listed if problem.name not in entries.keys() - failed]
    left.sort(key=lambda problem: problem.name in failed)
    info, clock = machine.machine_info(device), Clock(args.budget_s)

    def save() -> None:
        results.write(path, [entries[name] for name in sorted(entries)], info)

    for problem in (bar := tqdm(left, unit="problem", disable=None)):
        bar.set_description(problem.name)
        before = entries.get(problem.name)
        entries[problem.name] = failure(problem, "not finished")  # if the process is killed
        save()
        try:
            entries[problem.name] = measure(problem, device, args.toy, clock)
        except Late:
            print(f"the {args.budget_s:g} s are spent: the same command goes on with the rest")
            del entries[problem.name]
            if before is not None:
                entries[problem.name] = before
            return
        except Exception as error:
            traceback.print_exc()
            entries[problem.name] = failure(problem, in_words(error))
            timing.synchronize(device)  # raises again what broke the GPU
        finally:
            save()


def measure(problem: Problem, device: torch.device, toy: bool, clock: Clock) -> dict:
    """The entry of a problem in the shape of pytest-benchmark's JSON.

    A launch with a wrong result, or that fails for any reason but too little shared memory, is
    listed as such and takes no part: it is an error of a kernel or of a compiler.

    Raises Late before it is late, with what compiling will take; RuntimeError where no launch is
    right; and whatever a lost GPU raises.
    """
    launches = candidates(problem, toy)
    if device.type == "cuda":
        clock.check(programs(launches) * COMPILE_SECONDS / (os.cpu_count() or 1))
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
        clock.check()
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

    clock.check()
    best = sorted(screened, key=screened.__getitem__)[:FINALISTS]
    compared = {"torch": laps.lap(by_torch, sets, count, device)}
    for number in sorted({0, *best} & screened.keys()):
        compared[str(number)] = laps.lap(runs[number], sets, count, device)
    seconds = laps.interleaved(compared, FINAL_ROUNDS[device.type], device)
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
    fullname = f"bench/kernels/tune.py::{problem.name}"
    names = {"group": "tune", "name": problem.name, "fullname": fullname}
    return names | {"params": {"op": problem.op}, "stats": stats, "extra_info": info}


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
    found = ""
    for number, (actual, (exact, bound)) in enumerate(zip(outputs(result), allowed, strict=True)):
        error = (actual.double() - exact).abs().max().item()
        if not error <= bound:  # NaN is no small error either
            found += f"output {number}: error {error:.3g} against fp64, allowed {bound:.3g}. "
    return found.strip()


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


def write_table(path: Path, entries: list[dict]) -> None:
    """Renews in `path` the rows of what `entries` measured; the others stay."""
    document = {"launch": [], "faster": []}
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
    measured = [each["extra_info"] for each in entries if not is_failure(each)]
    found = {"launch": launch_rows(measured), "faster": faster_rows(measured)}
    rows = {"launch": ("arch", "tokens"), "faster": ("device",)}
    for name, more in rows.items():
        kept = {_key(row, *more): row for row in document[name]}
        for row in found[name]:
            kept[_key(row, *more)] = row
        document[name] = [kept[key] for key in sorted(kept) if kept[key]["tokens"]]
    lists = ",\n".join(
        f' "{name}": [' + ",".join(f"\n  {json.dumps(row)}" for row in document[name]) + "\n ]"
        for name in rows
    )
    with replacing(path.parent) as folder:
        (folder / path.name).write_text("{\n" + lists + "\n}\n", encoding="utf-8")


def _key(row: dict, *more: str) -> tuple:
    return (*(row[name] for name in ("op", "dtype")), *row["sizes"], *(row[name] for name in more))


def launch_rows(measured: list[dict]) -> list[dict]:
    return [
        {name: info[name] for name in ("arch", "op")}
        | {"dtype": "float32" if info["dtype"] == "float32" else "half"}
        | {name: info[name] for name in ("sizes", "tokens", "launch")}
        for info in measured
    ]


def faster_rows(measured: list[dict]) -> list[dict]:
    """Runs of neighbouring measured M at which Triton won; none, too, so that old ones go."""
    compared = [info for info in measured if info["op"] != "slice_grad"]  # which torch lacks
    names = ("device", "op", "dtype", "sizes")
    by_tokens: dict[str, list[dict]] = {}
    for info in sorted(compared, key=lambda info: info["tokens"]):
        by_tokens.setdefault(json.dumps([info[name] for name in names]), []).append(info)
    rows = []
    for key, infos in by_tokens.items():
        runs = [(won, list(run)) for won, run in groupby(infos, lambda info: info["wins"])]
        ranges = [[run[0]["tokens"], run[-1]["tokens"]] for won, run in runs if won]
        rows.append(dict(zip(names, json.loads(key), strict=True)) | {"tokens": ranges})
    return rows


def complaints(entries: dict[str, dict]) -> set[str]:
    """A line for each launch that is an error, and for each problem that failed."""
    lines = {f"{name}: {e['extra_info']['why']}" for name, e in entries.items() if is_failure(e)}
    return lines | {
        f"{name}, {refused['launch']}: {refused['why']}"
        for name, entry in entries.items()
        for refused in entry["extra_info"].get("refused", ())
        if refused["wrong"]
    }


def summary(entries: dict[str, dict]) -> list[list[str]]:
    """Rows of a table: times per launch, and their ratio."""
    rows = [["problem", "torch us", "triton us", "ratio", "quartiles", "wins"]]
    for name, each in sorted(entries.items()):
        if is_failure(each):
            continue
        info = each["extra_info"]
        ratio = info["ratio_to_torch"]
        times = (info["torch"]["median"], each["stats"]["median"])
        rows.append([name, *(f"{value * 1e6:.1f}" for value in times), f"{ratio['median']:.3f}"])
        rows[-1] += [f"{ratio['q1']:.3f}..{ratio['q3']:.3f}", "yes" if info["wins"] else ""]
    return rows


if __name__ == "__main__":
    sys.exit(main())
