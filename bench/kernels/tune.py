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
import json
import sys
import time
import traceback
from itertools import groupby
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from bench.kernels.candidates import OPS, Problem, candidates, problems
from bench.kernels.trial import Late, failure, in_words, measure, source_hash
from bench.measure import machine, results, timing
from s2kernels.files import replacing
from s2kernels.kernels import target, tuned


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
    file = results.Results(path, device, source_hash())
    try:
        measure_missing(listed, file, device, args)
    finally:
        known = [file.entries[name] for name in sorted(file.entries) if file.has(name)]
        entries = {entry["name"]: entry for entry in known}
        write_table(args.table, known)
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


def measure_missing(
    listed: list[Problem], file: results.Results, device: torch.device, args: argparse.Namespace
) -> None:
    """Measures what `file` lacks of `listed`, then what failed before.

    Raises what a lost GPU raises: nothing more can be measured in this process.
    """
    before = {each: file.entries[each.fullname] for each in listed if file.has(each.fullname)}
    left = [each for each in listed if each not in before]
    left += [each for each, entry in before.items() if is_failure(entry)]
    end = time.monotonic() + args.budget_s
    for problem in (bar := tqdm(left, unit="problem", disable=None)):
        bar.set_description(problem.name)
        file.add(failure(problem, "not finished"))  # if the process is killed
        try:
            file.add(measure(problem, device, args.toy, end))
        except Late:
            print(f"the {args.budget_s:g} s are spent: the same command goes on with the rest")
            del file.entries[problem.fullname]
            file.add(*(before[each] for each in [problem] if each in before))
            return
        except Exception as error:
            traceback.print_exc()
            file.add(failure(problem, in_words(error)))
            timing.synchronize(device)  # raises again what broke the GPU


def is_failure(entry: dict) -> bool:
    return entry["stats"] is None


def write_table(path: Path, entries: list[dict]) -> None:
    """Renews in `path` the rows of what `entries` measured; the others stay."""
    document = {"launch": [], "faster": []}
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
    measured = [each["extra_info"] for each in entries if not is_failure(each)]
    for name, rows in (("launch", launch_rows(measured)), ("faster", faster_rows(measured))):
        found = {_key(row): row for row in [*document[name], *rows]}
        document[name] = [found[key] for key in sorted(found) if found[key]["tokens"]]
    with replacing(path.parent) as folder:
        (folder / path.name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _key(row: dict) -> tuple:
    where = (row["arch"], row["tokens"]) if "arch" in row else (row["device"],)
    return (row["op"], row["dtype"], *row["sizes"], *where)


def launch_rows(measured: list[dict]) -> list[dict]:
    names = ("arch", "op", "dtype", "sizes", "tokens", "launch")
    rows = [{name: info[name] for name in names} for info in measured]
    return [row if row["dtype"] == "float32" else row | {"dtype": "half"} for row in rows]


def faster_rows(measured: list[dict]) -> list[dict]:
    """Runs of neighbouring measured M at which Triton won; none, too, so that old ones go."""
    names = ("device", "op", "dtype", "sizes")
    compared = [info for info in measured if info["op"] != "slice_grad"]  # which torch lacks
    compared.sort(key=lambda info: [*(info[name] for name in names), info["tokens"]])
    rows = []
    for key, infos in groupby(compared, lambda info: [info[name] for name in names]):
        runs = [(won, list(run)) for won, run in groupby(infos, lambda info: info["wins"])]
        ranges = [[run[0]["tokens"], run[-1]["tokens"]] for won, run in runs if won]
        rows.append(dict(zip(names, key, strict=True)) | {"tokens": ranges})
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
