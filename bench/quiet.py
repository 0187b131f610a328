"""Which cases were measured while the machine was slow, as their floors tell.

A ratio to the floor stands on its own only as long as what slows the machine slows both alike. A
busy neighbour, or a GPU that is hot, does not: products on all cores lose more than what waits for
memory, so the ratio of a method with much of the latter is too good there. What a floor of one
model and size takes should be one number in a whole run, and tells when it is not, without a look
at the ratio.
"""

from collections.abc import Iterable

SLOWER = 0.04  # than the fastest floor of the same model and size


def disturbed(entries: Iterable[dict]) -> list[dict]:
    """Measured entries whose floor was slower than others of its size by SLOWER, worst first.

    Copies are left out.
    """
    entries = [
        entry
        for entry in entries
        if entry["stats"] is not None and "copy_of" not in entry["extra_info"]
    ]
    fastest: dict[tuple, float] = {}
    for entry in entries:
        size = floor_of(entry)
        fastest[size] = min(seconds(entry), fastest.get(size, seconds(entry)))

    def slowness(entry: dict) -> float:
        return seconds(entry) / fastest[floor_of(entry)]

    slow = [entry for entry in entries if slowness(entry) > 1 + SLOWER]
    return sorted(slow, key=slowness, reverse=True)


def seconds(entry: dict) -> float:
    """The median step of the floor beside which `entry` was measured."""
    return entry["extra_info"]["floor_seconds"]["median"]


def floor_of(entry: dict) -> tuple:
    """What the floor of `entry` depends on; it computes dx in full depth whatever the case does."""
    params, options = entry["params"], entry["params"]["options"]
    names = ("shape", "layers", "vocab", "batch", "length", "dtype")
    chosen = (value for name, value in options.items() if name != "full_depth")
    return *(params[name] for name in names), *chosen
