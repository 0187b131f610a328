"""Finds the fastest launch of every kernel at the shapes of real models, on the GPU at hand.

    python -m bench.kernels.tune [--budget-s 1200] [--ops slice_grad linear ...]

Of each problem every candidate is checked against fp64, and those that are right are timed beside
torch in interleaved rounds. bench/results/<device>/tune.json is written after each problem, so that
the same command goes on where a run ended. Then the fastest launches, and the shapes at which
Triton beat torch by more than the spread, are written into s2kernels/kernels/tuned.json, which
every process reads that starts later.

Returns 1 if a launch gave a wrong result or did not run, other than for want of shared memory, or
if a problem failed: the others are measured all the same, and it comes last in the next run.
"""

import argparse
import json
import sys
import time
import traceback
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from bench.kernels.candidates import PEERS, Problem, problems
from bench.kernels.trial import entry, in_words, measure
from bench.measure import machine, results, timing
from s2kernels.files import replacing
from s2kernels.kernels import target, tuned


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = machine.default_device()
    if device.type == "cpu" and not (args.toy and triton.knobs.runtime.interpret):
        print("the tuner measures a GPU; without one it rehearses: TRITON_INTERPRET=1, and --toy")
        return 2
    ops = [op for op in args.ops if op == "slice_grad" or target.has_descriptors(device)]
    if skipped := sorted(set(args.ops) - set(ops)):
        print(f"{target.chip(device).arch} has no descriptor kernels: no {', '.join(skipped)}")

    path = args.results / machine.device_name(device) / "tune.json"
    file = results.Results(path, device)
    try:
        measure_missing(problems(ops, args.toy), file, device, args)
    finally:
        known = [file.entries[name] for name in sorted(file.entries) if file.has(name)]
        write_table(args.table, [each["extra_info"] for each in known if each["stats"]])
    wrong = [line for each in known for line in complaints(each)]
    print("\n".join(["WRONG OR FAILED", *wrong] if wrong else []))
    return 1 if wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.tune", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--budget-s", type=float, default=1200.0, help="seconds (default 1200)")
    parser.add_argument("--ops", nargs="+", choices=PEERS, default=list(PEERS), metavar="OP")
    parser.add_argument("--toy", action="store_true", help="a rehearsal at tiny shapes")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--table", type=Path, default=tuned.PATH, help="the file that is renewed")
    args = parser.parse_args(argv)
    if args.toy and (args.table == tuned.PATH or args.results == results.FOLDER):
        parser.error("--toy needs --results and --table: its numbers mean nothing")
    return args


def measure_missing(
    listed: list[Problem], file: results.Results, device: torch.device, args: argparse.Namespace
) -> None:
    """Measures what `file` lacks of `listed`, then what failed before, and begins none too late.

    Raises what a lost GPU raises: nothing more can be measured in this process.
    """
    end = time.monotonic() + args.budget_s
    done = {name for name, each in file.entries.items() if file.has(name) and each["stats"]}
    left = [each for each in listed if each.name not in done]
    left.sort(key=lambda problem: file.has(problem.name))  # what failed comes last
    for problem in (bar := tqdm(left, unit="problem", disable=None)):
        if time.monotonic() > end:
            print(f"the {args.budget_s:g} s are spent: the same command goes on with the rest")
            return
        bar.set_description(problem.name)
        file.add(entry(problem, None, why="not finished"))  # if the process is killed
        try:
            found = measure(problem, device, args.toy)
        except Exception as error:
            traceback.print_exc()
            file.add(entry(problem, None, why=in_words(error)))
            timing.synchronize(device)  # raises again what broke the GPU
            continue
        file.add(found)
        us, ratio = found["stats"]["median"] * 1e6, found["extra_info"]["ratio_to_torch"]
        times = f"{ratio['median']:.3f} times torch's ({ratio['q1']:.3f} to {ratio['q3']:.3f})"
        bar.write(f"{problem.name}: {us:.1f} us, {times}")


# What tells the rows of each list of the table apart, and orders them.
_launched = itemgetter("op", "dtype", "sizes", "arch", "tokens")
_compared = itemgetter("op", "dtype", "sizes", "device")


def write_table(path: Path, measured: list[dict]) -> None:
    """Renews in `path` the rows of the problems of which `measured` has the extra_info."""
    document = {"launch": [], "faster": []}
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
    names = ("arch", "op", "dtype", "sizes", "tokens", "launch")
    launches = [{name: info[name] for name in names} | {"dtype": "half"} for info in measured]
    wins = faster_rows(measured)
    for name, key, new in (("launch", _launched, launches), ("faster", _compared, wins)):
        rows = {str(key(row)): row for row in document[name] + new}
        document[name] = sorted((row for row in rows.values() if row["tokens"]), key=key)
    with replacing(path.parent) as folder:
        (folder / path.name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def faster_rows(measured: list[dict]) -> list[dict]:
    """Runs of neighbouring measured M at which Triton won; none, too, so that old ones go."""
    infos = [info for info in measured if info["op"] != "slice_grad"]  # which torch lacks
    infos.sort(key=lambda info: (_compared(info), info["tokens"]))
    rows = []
    for (op, dtype, sizes, device), of_shape in groupby(infos, _compared):
        runs = [(won, list(run)) for won, run in groupby(of_shape, itemgetter("wins"))]
        ranges = [[run[0]["tokens"], run[-1]["tokens"]] for won, run in runs if won]
        rows.append(dict(device=device, op=op, dtype=dtype, sizes=sizes, tokens=ranges))
    return rows


def complaints(entry: dict) -> list[str]:
    """A line for each launch that is an error, or one for a problem that failed."""
    name, info = entry["name"], entry["extra_info"]
    if not entry["stats"]:
        return [f"{name}: {info['why']}"]
    wrong = [each for each in info["refused"] if each["wrong"]]
    return [f"{name}, {each['launch']}: {each['why']}" for each in wrong]


if __name__ == "__main__":
    sys.exit(main())
