"""Whether any step got slower or larger: two files of results of `pytest bench/steps`.

    python -m bench.steps.compare REFERENCE.json CANDIDATE.json

Times are compared as ratios to the frozen floor of their own run. Saved bytes and trained
parameters are compared exactly, peaks within 1 %. Prints every case that both files have.

Exits with 1 where something is slower or larger by more than the two runs can differ; else with 3
where times are too noisy to judge; else with 0.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.measure import results

BETWEEN_RUNS = 0.02  # two runs of the same code differ by so much beside their spread
STANDARD_ERRORS = 3.0  # of the two medians together, which count as spread
MAX_SPREAD = 0.05  # beyond which an equal time says nothing
EXACT, PEAKS, PEAK_TOLERANCE = ("saved", "unseen"), ("peak", "first_step_peak"), 0.01
LOSS, NOISE = 1, 3  # exit codes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.steps.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("reference", type=Path)
    parser.add_argument("candidate", type=Path)
    args = parser.parse_args(argv)
    try:
        return compare(results.read(args.reference), results.read(args.candidate))
    except ValueError as error:
        parser.error(str(error))


def compare(reference: dict, candidate: dict) -> int:
    """Prints what the two documents have in common; LOSS, NOISE or 0.

    Raises ValueError where they are of different devices or have no case in common.
    """
    devices = [document["machine_info"]["gpu"] or "cpu" for document in (reference, candidate)]
    if devices[0] != devices[1]:
        raise ValueError(f"ratios of two devices cannot be compared: {' and '.join(devices)}")
    old, new = (
        {entry["fullname"]: entry for entry in document["benchmarks"]}
        for document in (reference, candidate)
    )
    both = [name for name in new if name in old]
    if not both:
        raise ValueError(f"no case is in both: reference {sorted(old)}, candidate {sorted(new)}")
    rows = [["case", "before", "after", "change", "spread"]]
    losses, noisy = [], []
    for name in both:
        before, after = (each[name]["extra_info"] for each in (old, new))
        case = case_of(name)
        losses += [f"{case}: {words}" for words in larger(before, after)]
        if "ratio_to_floor" not in before or "ratio_to_floor" not in after:
            continue
        ratios = [extra["ratio_to_floor"]["median"] for extra in (before, after)]
        change, spread = ratios[1] / ratios[0] - 1, spread_of(before, after)
        words = [*(f"{ratio:.3f}" for ratio in ratios), f"{change:+.1%}", f"{spread:.1%}"]
        rows.append([case, *words])
        if change > spread:
            losses.append(f"{case}: step / floor {words[0]} -> {words[1]}")
        elif spread > MAX_SPREAD:
            noisy.append(case)
    print(results.table(rows))
    for loss in losses:
        print(f"LOSS  {loss}")
    for case in noisy:
        print(f"too noisy to judge: {case}")
    if not losses:
        print(f"no loss in {len(both)} cases")
    return LOSS if losses else NOISE if noisy else 0


def larger(before: dict, after: dict) -> Iterator[str]:
    """What of two extra_infos is larger than it was, or is other work, in words."""
    if before["status"] != after["status"]:
        if after["status"] != "measured":
            yield f"{before['status']} -> {after['status']}"
        return
    if after["status"] != "measured":
        return
    trained = [extra["trained_parameters"] for extra in (before, after)]
    if trained[0] != trained[1]:
        yield f"trained parameters {trained[0]:,} -> {trained[1]:,}"
    for part, tolerance in [*((p, 0.0) for p in EXACT), *((p, PEAK_TOLERANCE) for p in PEAKS)]:
        sizes = [extra["bytes"][part] for extra in (before, after)]
        if None not in sizes and sizes[1] - sizes[0] > tolerance * sizes[0]:
            yield f"{part} {sizes[0]:,} -> {sizes[1]:,} bytes"


def spread_of(before: dict, after: dict) -> float:
    """By how much two medians of the same code may differ, as a share."""
    errors = [standard_error(extra["ratio_to_floor"]) for extra in (before, after)]
    return BETWEEN_RUNS + STANDARD_ERRORS * math.hypot(*errors)


def standard_error(ratio: Mapping) -> float:
    """Standard error of a median, as a share of it.

    From the quartiles: those of a normal distribution are 1.349 sigma apart, and the median of n
    values errs by 1.253 sigma / sqrt(n).
    """
    return 1.253 / 1.349 * ratio["iqr"] / math.sqrt(len(ratio["data"])) / ratio["median"]


def case_of(fullname: str) -> str:
    return fullname.partition("[")[2].removesuffix("]") or fullname


def overview(entries: Mapping[str, dict]) -> str:
    """A table of the steps among `entries`, one line a case; "" where there are none."""
    rows = [["case", "trained", "step / floor", "quartiles", "step ms", "saved MiB", "peak MiB"]]
    for name, entry in entries.items():
        extra = entry["extra_info"]
        if "ratio_to_floor" in extra:
            ratio, sizes = extra["ratio_to_floor"], extra["bytes"]
            saved = "-" if sizes["saved"] is None else f"{sizes['saved'] / 2**20:.1f}"
            row = [f"{extra['trained_parameters']:,}", f"{ratio['median']:.3f}"]
            row += [f"{ratio['q1']:.3f}..{ratio['q3']:.3f}"]
            row += [f"{entry['stats']['median'] * 1e3:.1f}", saved, f"{sizes['peak'] / 2**20:.1f}"]
            rows.append([case_of(name), *row])
        elif extra.get("status", "measured") != "measured":
            rows.append([case_of(name), extra["status"].partition(":")[0], *[""] * 5])
    return results.table(rows) if rows[1:] else ""


if __name__ == "__main__":
    raise SystemExit(main())
