"""Which cases were measured while the machine was slow, as their floors tell.

A ratio to the floor stands on its own only as long as what slows the machine slows both alike. A
busy neighbour, or a GPU that is hot, does not: products on all cores lose more than what waits for
memory, so the ratio of a method with much of the latter is too good there. What the floor of one
model and size takes should be one number in a whole run, and tells when it is not.

The floor is a part of the ratio, so to choose by it is not quite neutral: a floor that was slow for
a reason of its own, as by where its model lies in memory, is measured again, one that was fast is
not. Hence a floor is judged by the faster half of its like, and not by the fastest of all.
"""

import statistics
from collections.abc import Iterable

SLOWER = 0.06  # than the lower quartile of the floors of the same model and size


def disturbed(entries: Iterable[dict]) -> list[tuple[dict, float]]:
    """Entries measured beside a floor slower than those of its size by SLOWER, worst first.

    With each the seconds that its floor may take at the most. Left out are copies, those that were
    timed apart from their floor, and compiled ones: to compile them again takes minutes.
    """
    sizes: dict[tuple, list[dict]] = {}
    for entry in entries:
        extra = entry["extra_info"]
        measured = entry["stats"] is not None and "copy_of" not in extra
        if measured and extra["paired"] and not entry["params"]["options"]["compile"]:
            sizes.setdefault(floor_of(entry), []).append(entry)
    slow = []
    for alike in sizes.values():
        if len(alike) < 2:
            continue
        floors = [seconds(entry) for entry in alike]
        limit = statistics.quantiles(floors, n=4, method="inclusive")[0] * (1 + SLOWER)
        slow += [(entry, limit) for entry in alike if seconds(entry) > limit]
    return sorted(slow, key=lambda pair: seconds(pair[0]) / pair[1], reverse=True)


def seconds(entry: dict) -> float:
    """The median step of the floor beside which `entry` was measured."""
    return entry["extra_info"]["floor_seconds"]["median"]


def floor_of(entry: dict) -> tuple:
    """What the floor of `entry` depends on; it computes dx in full depth whatever the case does."""
    params, options = entry["params"], entry["params"]["options"]
    names = ("shape", "layers", "vocab", "batch", "length", "dtype")
    chosen = (value for name, value in options.items() if name != "full_depth")
    return *(params[name] for name in names), *chosen
