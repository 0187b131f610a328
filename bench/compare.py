"""Whether anything got slower or larger: a short set of steps beside the committed results.

    python -m bench.compare                      measures the short suite and compares it
    python -m bench.compare --candidate FILE     compares a file that is there already
    python -m bench.compare --results FILE       lists every ratio of two runs of the same code

Times are compared as ratios to the frozen floor of their own run, never as they are; bytes and
trained parameters as they are, and operators too where both files are of the same versions of
torch and the like. Prints what moved beyond the spread. Both files must be of one class of devices:
the same GPU, or CPUs.

Exits with 1 if anything is a loss, a case of the short suite that could not be measured included;
else with 3 if times were too noisy to judge by; else with 0. With --results, with 1 if any two
ratios are more than 5 % apart.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import agreement, cases, laboratory, report, timing

# How far two runs of the same code may lie apart, beside what their spread explains: where the
# models happen to lie in memory stays the same for all rounds of a run.
BETWEEN_RUNS = 0.02
STANDARD_ERRORS = 3.0  # of the two medians together, that count as spread
MAX_SPREAD = 0.05  # beyond which a change within the spread says nothing
PEAK = 0.01  # of the bytes at the peak: other versions of torch take other temporaries
LOSS, NOISE = 1, 3  # exit codes; 2 is argparse's


@dataclass(frozen=True)
class Move:
    """A quantity of a case that is not what it was. `loss`: for the worse."""

    case: str
    what: str
    before: str
    after: str
    loss: bool

    def __str__(self) -> str:
        verdict = "LOSS" if self.loss else "gain"
        return f"{verdict}  {self.case}: {self.what} {self.before} -> {self.after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--reference", type=Path, help="default bench/results/<device>/steps.json")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--candidate", type=Path, help="default: measured now")
    files.add_argument(
        "--results", type=Path, help="of another run, of which all ratios are listed"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU"
    )
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = Path(report.device_name(device)) / laboratory.FILE
    reference = read(args.reference or report.RESULTS / name)
    if args.results is not None:
        other = read(args.results)
        check_class(reference, other)
        return 0 if agreement.agree(reference, other) else LOSS
    if args.candidate is not None:
        return compare(reference, read(args.candidate))
    with tempfile.TemporaryDirectory() as folder:
        failed = laboratory.main(["--suite", "short", "--device", device.type, "--results", folder])
        wanted = {case.id for case in cases.short(device.type)}
        return compare(reference, read(Path(folder) / name), wanted) or failed


def read(path: Path) -> dict:
    """The document in `path`; raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"results to compare with must be in {path}: no such file")
    return json.loads(path.read_text())


def compare(reference: dict, candidate: dict, wanted: Collection[str] = ()) -> int:
    """Prints what moved; LOSS, NOISE or 0.

    wanted: names of cases that the candidate must have where the reference has them.

    Raises ValueError for devices of two classes, and where no case is in both.
    """
    check_class(reference, candidate)
    before, after = (document["machine_info"] for document in (reference, candidate))
    old, new = (by_name(document) for document in (reference, candidate))
    both = [name for name in new if name in old]
    if not both:
        raise ValueError(f"no case is in both: reference {sorted(old)}, candidate {sorted(new)}")
    if not report.same_machine(before, after):
        print("note: another processor or allocator, or other versions of torch and the like")

    changes, noisy = [], []
    for name in both:
        ratios = [entry["extra_info"].get("ratio_to_floor") for entry in (old[name], new[name])]
        if None not in ratios:
            change = ratios[1]["median"] / ratios[0]["median"] - 1
            changes.append(change)
            if abs(change) <= spread(*ratios) > MAX_SPREAD:
                noisy.append(name)
            print(
                f"{name}: step / floor {ratios[0]['median']:.3f} -> {ratios[1]['median']:.3f}, "
                f"{change:+.1%} (spread {spread(*ratios):.1%})"
            )
    same_versions = all(before.get(name) == after.get(name) for name in report.PACKAGES)
    moves = [move for name in both for move in moves_of(old[name], new[name], same_versions)]
    moves += [
        Move(name, "status", old[name]["extra_info"]["status"], "not measured", True)
        for name in old
        if name in wanted and name not in new
    ]
    print(f"\n{len(both)} cases in both", end="")
    print(f"; largest change of a ratio {max(map(abs, changes)):.1%}" if changes else "")
    for move in moves:
        print(move)
    for name in noisy:
        print(f"noise {name}: too noisy to judge: the spread is beyond {MAX_SPREAD:.0%}")
    losses = sum(move.loss for move in moves)
    print("no loss" if not losses else f"{losses} losses")
    if losses:
        return LOSS
    return NOISE if noisy else 0


def check_class(reference: dict, candidate: dict) -> None:
    """Raises ValueError for documents of devices of two classes."""
    before, after = (device_class(each["machine_info"]) for each in (reference, candidate))
    if before != after:
        raise ValueError(
            "ratios of two classes of devices cannot be compared: reference "
            f"{before!r}, candidate {after!r}"
        )


def device_class(machine: dict) -> str:
    """The GPU by its name; all CPUs are one class, since only ratios are compared."""
    return machine["gpu"] or "cpu"


def by_name(document: dict) -> dict[str, dict]:
    return {entry["name"]: entry for entry in document["benchmarks"]}


def spread(before: dict, after: dict) -> float:
    """How far apart two medians may lie, as a share: their errors, and that of any two runs."""
    errors = [timing.standard_error(ratio["data"]) for ratio in (before, after)]
    return BETWEEN_RUNS + STANDARD_ERRORS * math.hypot(*errors)


def moves_of(before: dict, after: dict, same_versions: bool) -> Iterator[Move]:
    """What moved beyond the spread between two entries of one case.

    same_versions: of torch and the like, each of which has other operators.
    """
    name = after["name"]
    old, new = before["extra_info"], after["extra_info"]
    if old["status"] != new["status"]:
        yield Move(name, "status", old["status"], new["status"], new["status"] != "measured")
    if "measured" not in (old["status"], new["status"]) or old["status"] != new["status"]:
        return

    if "ratio_to_floor" in old and "ratio_to_floor" in new:
        ratios = old["ratio_to_floor"], new["ratio_to_floor"]
        change = ratios[1]["median"] / ratios[0]["median"] - 1
        if abs(change) > spread(*ratios):
            words = (f"{ratio['median']:.3f}" for ratio in ratios)
            yield Move(name, "step / floor", *words, change > 0)

    trained = [extra["trained_parameters"] for extra in (old, new)]
    if trained[0] != trained[1]:  # more or fewer: it is not the same work
        yield Move(name, "trained parameters", *map(str, trained), True)

    exact, peaks = ("saved", "unseen"), ("peak", "first_step_peak")
    for what, tolerance in (*((one, 0.0) for one in exact), *((one, PEAK) for one in peaks)):
        sizes = [extra["bytes"][what] for extra in (old, new)]
        if _moved(*sizes, tolerance):
            words = (f"{size:,} bytes" for size in sizes)
            yield Move(name, what, *words, sizes[1] > sizes[0])

    for what, tolerance in (("ops", 0.0), ("launches", PEAK)) if same_versions else ():
        numbers = [extra.get(what) for extra in (old, new)]
        if _moved(*numbers, tolerance):
            yield Move(name, what, *map(str, numbers), numbers[1] > numbers[0])


def _moved(before: int | None, after: int | None, tolerance: float) -> bool:
    """By more than `tolerance`, as a share; not where either is unknown."""
    return None not in (before, after) and abs(after - before) > tolerance * before


if __name__ == "__main__":
    raise SystemExit(main())
