"""Finds the fastest launch of every kernel at the shapes of real models, on the GPU at hand.

    python -m bench.tune [--budget-s 1200] [--ops linear linear_dx ...] [--dry-run]

For each problem it checks every candidate against fp64 before it times it, times the best few once
more beside torch in interleaved rounds, and keeps the results in bench/results/<device>/tune.json,
so that a run that ends early goes on where it stopped. From all such files it writes
s2kernels/kernels/tuned.py: the fastest launches, and the shapes at which Triton beat cuBLAS by more
than the spread.

Returns 1 if a launch gave a wrong result or did not run, other than for want of shared memory, or
if a problem failed: the others are measured all the same, and it comes last in the next run.
"""

import argparse
import json
import sys
import traceback
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from bench import report, tables, timing
from bench.problems import OPS, Problem, candidates, problems
from bench.trials import (
    KERNELS,
    Clock,
    Late,
    failure,
    in_words,
    is_failure,
    measure,
    source_hash,
)
from s2kernels.files import replacing
from s2kernels.kernels import target

TABLE = KERNELS / "tuned.py"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops = [op for op in args.ops if op == "slice_grad" or target.has_descriptors(device)]
    if skipped := sorted(set(args.ops) - set(ops)):
        print(f"{target.chip(device).arch} has no descriptor kernels: no {', '.join(skipped)}")
    listed = problems(ops, args.toy)
    if args.dry_run:
        for problem in listed:
            print(f"{problem.name}: {len(candidates(problem, args.toy))} candidates")
        return 0
    if device.type == "cpu" and not (args.toy and triton.knobs.runtime.interpret):
        print("bench.tune measures a GPU; without one it rehearses: TRITON_INTERPRET=1, and --toy")
        return 2

    path = args.results / report.device_name(device) / "tune.json"
    entries = measured_before(path)
    try:
        measure_missing(listed, entries, path, device, args)
    finally:
        write_table(args.table, args.results)
    print(report.table(summary(entries)))
    wrong = sorted(complaints(entries))
    print("\n".join(["WRONG OR FAILED", *wrong] if wrong else []))
    return 1 if wrong else 0


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
    machine, clock = report.machine_info(device), Clock(args.budget_s)
    for problem in (bar := tqdm(left, unit="problem", disable=None)):
        bar.set_description(problem.name)
        before = entries.get(problem.name)
        entries[problem.name] = failure(problem, "not finished")  # if the process is killed
        save(path, entries, device, machine)
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
            save(path, entries, device, machine)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--budget-s", type=float, default=1200.0, help="seconds (default 1200)")
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP")
    parser.add_argument("--dry-run", action="store_true", help="list the problems, measure nothing")
    parser.add_argument("--toy", action="store_true", help="a rehearsal at tiny shapes")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args(argv)
    if args.toy and (args.table == TABLE or args.results == report.RESULTS):
        parser.error("--toy needs --results and --table: its numbers mean nothing")
    return args


def measured_before(path: Path) -> dict[str, dict]:
    """The entries of `path` that were measured with the kernels as they are, by name."""
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    return {
        entry["name"]: entry for entry in entries if entry["extra_info"]["source"] == source_hash()
    }


def save(path: Path, entries: dict[str, dict], device: torch.device, machine: dict) -> None:
    report.write_json(path, [entries[name] for name in sorted(entries)], device, machine)


def write_table(path: Path, results: Path) -> None:
    with replacing(path.parent) as folder:
        text = tables.source(tables.measurements(results))
        (folder / path.name).write_text(text, encoding="utf-8")


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
    for name, entry in sorted(entries.items()):
        if is_failure(entry):
            continue
        info = entry["extra_info"]
        ratio = info["ratio_to_torch"]
        rows.append(
            [
                name,
                f"{info['torch']['median'] * 1e6:.1f}",
                f"{entry['stats']['median'] * 1e6:.1f}",
                f"{ratio['median']:.3f}",
                f"{ratio['q1']:.3f}..{ratio['q3']:.3f}",
                "yes" if info["wins"] else "",
            ]
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
