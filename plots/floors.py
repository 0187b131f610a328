"""Seconds of steps that were timed minutes apart, for a figure or a table to show side by side.

The speed of a machine moves by more than methods differ. Each case was timed in rounds with a
frozen floor of its own, and its ratio to that floor holds whatever the speed was, so its seconds
are here this ratio times one floor for all cases of a size: the median of all that were timed.
"""

import statistics

NOTE = "Times: ratio to the frozen floor of the same rounds × the median floor of that size."


def steady_seconds(benchmarks: list[dict]) -> list[dict[str, float] | None]:
    """Of each entry of a steps.json: median, q1 and q3 of a step in seconds; None if not timed."""
    floors: dict[tuple, dict[str, float]] = {}
    for entry in benchmarks:
        if entry["stats"] is not None:
            extra = entry["extra_info"]
            case = extra.get("copy_of", entry["name"])  # a copy is not one more measurement
            floors.setdefault(_size(entry), {})[case] = extra["floor_seconds"]["median"]
    medians = {size: statistics.median(found.values()) for size, found in floors.items()}
    return [
        None if entry["stats"] is None else _times(entry, medians[_size(entry)])
        for entry in benchmarks
    ]


def _times(entry: dict, floor: float) -> dict[str, float]:
    ratio = entry["extra_info"]["ratio_to_floor"]
    return {name: ratio[name] * floor for name in ("median", "q1", "q3")}


def _size(entry: dict) -> tuple:
    """What a floor depends on; it computes dx in full depth whatever the case does."""
    params = entry["params"]
    names = ("shape", "layers", "vocab", "batch", "length", "dtype")
    options = (value for name, value in params["options"].items() if name != "full_depth")
    return *(params[name] for name in names), *options
