"""Whether two runs of the laboratory say the same: every ratio to the floor, beside the other's.

    python -m bench.compare --results OTHER.json

Unlike a comparison with a change in between, no spread excuses a difference here: what is asked is
how far a number of the results can be trusted.
"""

from bench import report

WITHIN = 0.05  # of each other: ratios of two runs that agree


def agree(first: dict, second: dict) -> bool:
    """Prints every ratio of two documents of results; whether all are within WITHIN.

    A case that only one of them has measured is a disagreement. Copies of a case are left out.
    """
    ratios = ratios_of(first), ratios_of(second)
    rows = [["case", "first", "second", "change"]]
    apart = []
    for name in dict.fromkeys((*ratios[0], *ratios[1])):
        a, b = (each.get(name) for each in ratios)
        change = None if a is None or b is None else b / a - 1
        cells = ("-" if value is None else f"{value:.3f}" for value in (a, b))
        rows.append([name, *cells, "-" if change is None else f"{change:+.1%}"])
        if change is None or abs(change) > WITHIN:
            apart.append(rows[-1])
    print(report.table(rows))
    print(f"\n{len(rows) - 1 - len(apart)} of {len(rows) - 1} ratios agree within {WITHIN:.0%}")
    for name, *values in apart:
        print(f"APART  {name}: {' -> '.join(values[:2])} ({values[2]})")
    return not apart


def ratios_of(document: dict) -> dict[str, float]:
    """The median step time over the floor's of every measured case, by its name."""
    return {
        entry["name"]: entry["extra_info"]["ratio_to_floor"]["median"]
        for entry in document["benchmarks"]
        if entry["stats"] is not None and "copy_of" not in entry["extra_info"]
    }
