"""The efficiency laboratory: training steps of every method, measured case by case.

    python -m bench.laboratory --suite cpu [--budget-s 600] [--only SUBSTRING] [--list]

Writes bench/results/<device>/steps.json after every case, and goes on where it was stopped: a case
that the file has already, of the same code, machine and versions, is not measured again. Nor is one
that is equal to such a case but for its suite: its entry is a copy. Cases come in the order of
their value; one that would not fit into what is left of --budget-s is left for the next run. Then
all are visited again, in turn, until each ratio is known to what GOAL says from rounds in which the
machine was quiet, as far as the budget goes; the same command without --again goes on with that.
Prints a table.

Exits with 1 if a case failed. Too little memory and a missing package are results, not failures.
"""

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from bench import cases, ceilings, extrapolation, host, report, timing
from bench.cases import Case
from bench.fresh import Setup
from bench.record import Record
from bench.run import Goal, Run, is_available, is_failure, is_of_this_code, is_unavailable

SUITES: dict[str, Callable[[str], list[Case]]] = {
    "cpu": lambda device_type: cases.cpu(),
    "gpu": lambda device_type: cases.gpu(),
    "toy": lambda device_type: cases.toy(),
    "short": cases.short,
}
PRECISION = {
    "cpu": timing.Precision(0.009, 8, max_rounds=1000, min_seconds=2.5, seconds=4.0),
    "gpu": timing.Precision(min_rounds=10, seconds=5.0),
    "toy": timing.Precision(error=1.0, min_rounds=2, max_rounds=2),
    "short": timing.Precision(0.003, 8, min_seconds=2.5, seconds=4.0),
}
# Of all visits together, for as long as the budget lasts.
GOAL = {
    "cpu": Goal(visits=2, quiet_rounds=20, error=0.009),
    "gpu": Goal(),
    "short": Goal(visits=2, quiet_rounds=20, error=0.009),
}
LAUNCHES = 0.1  # of the budget, for counting them at its end
FILE = "steps.json"


def main(argv: list[str] | None = None) -> int:
    began = time.perf_counter()
    args = parse(argv)
    device = torch.device(args.device)
    chosen = [case for case in SUITES[args.suite](device.type) if args.only in case.id]
    if args.list:
        print("\n".join(case.id for case in chosen))
        return 0
    transformers_logging.set_verbosity_error()
    # PEFT reads a property of the model that transformers is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    allocator = host.keep_freed_memory() if device.type == "cpu" else None
    machine = {"allocator": allocator} if allocator else {}
    machine |= {"ceilings": ceilings.measure(device), "clocks": report.gpu_clocks(device)}
    record = Record(args.results / report.device_name(device) / FILE, device, machine)
    if args.again:
        record.forget(case.fullname for case in chosen)
    known = {} if args.again else record.entries
    setup = Setup(device, PRECISION[args.suite], record.machine["ceilings"])
    end = None if args.budget_s is None else began + args.budget_s
    deadline = end
    if end is not None and device.type == "cuda":
        deadline = end - LAUNCHES * args.budget_s
    gc.collect()
    gc.freeze()  # what the imports made stays, and need not be looked at after every case
    prepare(device)
    run = Run(record, setup, deadline, known)
    with host.within_free_memory(device):
        run.measure(missing(chosen, record, device))
        if args.suite in GOAL:
            run.visit(chosen, GOAL[args.suite])
        run.deadline = end
        run.count_launches(chosen)

    entries = [record.entries[case.fullname] for case in chosen if case.fullname in record.entries]
    if entries:
        print(f"\n{report.steps_table(entries)}\n\n{report.STEPS_LEGEND}")
        for line in (*extrapolation.lines(entries), *unexpected(entries)):
            print(line)
    failed = [entry for entry in entries if is_failure(entry)]
    print(f"\n{record.path}: {len(entries)} of {len(chosen)} cases", end="")
    print(f", {time.perf_counter() - began:.0f} s")
    for entry in failed:
        print(f"{entry['name']}: {entry['extra_info']['status']}", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.laboratory", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--suite",
        choices=tuple(SUITES),
        help="toy: seconds, to see that all of it runs; short: what bench.compare measures; "
        "default: cpu or gpu, as the device is",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU"
    )
    parser.add_argument(
        "--budget-s", type=float, metavar="S", help="starts no case that would end later"
    )
    parser.add_argument(
        "--results", type=Path, help="folder; default bench/results, for the suites cpu and gpu"
    )
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of a case's id")
    parser.add_argument("--again", action="store_true", help="forget what the file has of these")
    parser.add_argument("--list", action="store_true", help="print the ids of the cases and stop")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    args.device = args.device or ("cuda" if gpu else "cpu")
    if args.device == "cuda" and not gpu:
        parser.error("--device cuda: torch finds no GPU here")
    args.suite = args.suite or {"cpu": "cpu", "cuda": "gpu"}[args.device]
    if args.budget_s is not None and not args.budget_s > 0:
        parser.error(f"--budget-s must be above 0, got {args.budget_s}")
    if args.results is None:
        if args.suite in ("toy", "short") and not args.list:
            parser.error(f"--results is wanted with --suite {args.suite}: it is not to be kept")
        args.results = report.RESULTS
    return args


def missing(chosen: list[Case], record: Record, device: torch.device) -> list[Case]:
    """What is to be measured, in the order of `chosen` but for what may wait.

    First what is not measured yet, or lacked a package that is here now; then what other code was
    measured of; last what failed or is equal to what did, which may fail again.
    """
    failures = [entry["params"] for entry in record.entries.values() if is_failure(entry)]

    def rank(case: Case) -> int | None:
        """None for what is known."""
        entry = record.entries.get(case.fullname)
        if entry is None:
            return 2 if case.params() in failures else 0
        if is_failure(entry):
            return 2
        if is_unavailable(entry):
            return 0 if is_available(case, device) else None
        return None if is_of_this_code(entry) else 1

    ranks = [(rank(case), case) for case in chosen]
    todo = [(place, case) for place, case in ranks if place is not None]
    return [case for _, case in sorted(todo, key=lambda pair: pair[0])]


def unexpected(entries: list[dict]) -> Iterator[str]:
    """A line for each case that keeps other activations than the model of its method says."""
    for entry in entries:
        model = entry["extra_info"].get("model")
        if "bytes" not in entry["extra_info"] or model is None:
            continue
        saved = entry["extra_info"]["bytes"]["saved"]
        if saved not in (None, model["saved"]):
            line = f"{entry['name']}: keeps {saved:,} bytes, {model['saved']:,} expected"
            yield line + (f" by a model of which holds: {model['fits']}" if model["fits"] else "")


def prepare(device: torch.device) -> None:
    """Has cuBLAS take its workspaces, of this thread and of autograd's, before a peak is read."""
    if device.type == "cuda":
        x = torch.ones(64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        (x @ x).sum().backward()


if __name__ == "__main__":
    raise SystemExit(main())
