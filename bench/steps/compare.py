"""Whether any step got slower or larger: two files of results of `pytest bench/steps`.

    python -m bench.steps.compare REFERENCE.json CANDIDATE.json

Times are compared as ratios to the frozen floor of their own run: a step is slower if its lower
quartile lies above the upper quartile of the reference, and both medians are more than 2 % apart.
Saved bytes and trained parameters are compared exactly, peaks within 1 %.

Exits with 1 where anything is slower or larger; else with 0.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.measure import results

BETWEEN_RUNS = 0.02  # two runs of the same code differ by so much beside their quartiles
TOLERANCES = {"saved": 0.0, "unseen": 0.0, "peak": 0.01, "first_step_peak": 0.01}  # of bytes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.steps.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("reference", type=Path)
    parser.add_argument("candidate", type=Path)
    args = parser.parse_args(argv)
    try:
        losses = compare(results.read(args.reference), results.read(args.candidate))
    except ValueError as error:
        parser.error(str(error))
    for loss in losses:
        print(f"LOSS  {loss}")
    print(f"{len(losses)} losses" if losses else "no loss")
    return 1 if losses else 0


def compare(reference: dict, candidate: dict) -> list[str]:
    """Prints the ratios of both documents; returns what is slower or larger, in words.

    Raises ValueError where they are of different devices or have no case in common.
    """
    documents = (reference, candidate)
    before, after = (document["machine_info"]["gpu"] or "cpu" for document in documents)
    if before != after:
        raise ValueError(f"ratios of two devices cannot be compared: {before} and {after}")
    old, new = (
        {case_of(entry["fullname"]): entry["extra_info"] for entry in document["benchmarks"]}
        for document in documents
    )
    both = [case for case in new if case in old]
    if not both:
        raise ValueError(f"no case is in both: reference {sorted(old)}, candidate {sorted(new)}")
    rows = [["case", "before", "after", "change"]]
    for case in both:
        if "ratio_to_floor" in old[case] and "ratio_to_floor" in new[case]:
            a, b = (extra[case]["ratio_to_floor"]["median"] for extra in (old, new))
            rows.append([case, f"{a:.3f}", f"{b:.3f}", f"{b / a - 1:+.1%}"])
    print(results.table(rows))
    return [f"{case}: {words}" for case in both for words in worse(old[case], new[case])]


def worse(before: dict, after: dict) -> Iterator[str]:
    """What of two extra_infos is slower or larger than it was, or is other work, in words."""
    if before["status"] != "measured" or after["status"] != "measured":
        if after["status"] not in ("measured", before["status"]):
            yield f"{before['status']} -> {after['status']}"
        return
    old, new = before["ratio_to_floor"], after["ratio_to_floor"]
    if new["q1"] > old["q3"] and new["median"] > old["median"] * (1 + BETWEEN_RUNS):
        yield f"step / floor {old['median']:.3f} -> {new['median']:.3f}"
    trained, trains = before["trained_parameters"], after["trained_parameters"]
    if trained != trains:
        yield f"trained parameters {trained:,} -> {trains:,}"
    for part, tolerance in TOLERANCES.items():
        sizes = [(extra.get("bytes") or {}).get(part) for extra in (before, after)]
        if None not in sizes and sizes[1] - sizes[0] > tolerance * sizes[0]:
            yield f"{part} {sizes[0]:,} -> {sizes[1]:,} bytes"


def case_of(fullname: str) -> str:
    return fullname.partition("[")[2].removesuffix("]") or fullname


def overview(entries: Mapping[str, dict]) -> str:
    """A table of the steps among `entries`, one line a case; "" where there are none."""
    rows = [["case", "trained", "step / floor", "quartiles", "step ms", "saved MiB", "peak MiB"]]
    for name, entry in entries.items():
        extra = entry["extra_info"]
        if "ratio_to_floor" in extra:
            ratio, sizes = extra["ratio_to_floor"], extra.get("bytes") or {}
            spread = f"{ratio['q1']:.3f}..{ratio['q3']:.3f}"
            cells = [f"{extra['trained_parameters']:,}", f"{ratio['median']:.3f}", spread]
            cells.append(f"{entry['stats']['median'] * 1e3:.1f}")
            cells += [f"{(sizes.get(part) or 0) / 2**20:.1f}" for part in ("saved", "peak")]
            rows.append([case_of(name), *cells])
        elif "status" in extra:  # a step that could not run
            rows.append([case_of(name), extra["status"].partition(":")[0], *[""] * 5])
    return results.table(rows) if rows[1:] else ""


if __name__ == "__main__":
    raise SystemExit(main())
