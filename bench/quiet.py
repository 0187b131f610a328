"""When the machine was quiet, as the floors tell.

A ratio to the floor stands on its own only as long as what slows the machine slows both alike. A
busy neighbour, or a GPU that is hot, does not: products on all cores lose more than what waits for
memory, so the ratio of a method with much of the latter is too good there. What the floor of one
model and size takes should be one number in a whole run, and tells when it is not.
"""

import statistics
from collections.abc import Iterable

from bench import visits

SLOWER = 0.06  # than the lower quartile of the visits to the same model and size


def limits(entries: Iterable[dict]) -> dict[tuple, float]:
    """Seconds that a floor may take while the machine is quiet, by `floor_of` its entry.

    From the faster visits of all cases of one size, but not from the fastest, which may be chance.
    Left out are copies, what was timed apart from its floor, and compiled models: to compile them
    again takes minutes. A size with one visit has no limit.
    """
    sizes: dict[tuple, list[float]] = {}
    for entry in entries:
        if may_be_visited(entry):
            medians = [statistics.median(visit.floor) for visit in visits.of(entry)]
            sizes.setdefault(floor_of(entry), []).extend(medians)
    return {
        size: statistics.quantiles(floors, n=4, method="inclusive")[0] * (1 + SLOWER)
        for size, floors in sizes.items()
        if len(floors) > 1
    }


def references(entries: Iterable[dict]) -> dict[tuple, float]:
    """One floor, in seconds, for all cases of a size, by `floor_of` them: the median of theirs.

    Times of cases that were measured minutes apart stand side by side as ratio times this.
    """
    sizes: dict[tuple, dict[str, float]] = {}
    for entry in entries:
        if entry["stats"] is not None:
            extra = entry["extra_info"]
            case = extra.get("copy_of", entry["name"])  # a copy is not one more measurement
            sizes.setdefault(floor_of(entry), {})[case] = extra["floor_seconds"]["median"]
    return {size: statistics.median(floors.values()) for size, floors in sizes.items()}


def may_be_visited(entry: dict) -> bool:
    """Whether a visit more would say more of the case: it was timed, beside its floor."""
    extra = entry["extra_info"]
    timed = entry["stats"] is not None and "copy_of" not in extra
    return timed and extra["paired"] and not entry["params"]["options"]["compile"]


def floor_of(entry: dict) -> tuple:
    """What the floor of `entry` depends on; it computes dx in full depth whatever the case does."""
    params, options = entry["params"], entry["params"]["options"]
    names = ("shape", "layers", "vocab", "batch", "length", "dtype")
    chosen = (value for name, value in options.items() if name != "full_depth")
    return *(params[name] for name in names), *chosen
