"""Which cases were measured while the machine was slow, as their floors tell.

A ratio to the floor stands on its own only as long as what slows the machine slows both alike. A
busy neighbour, or a GPU that is hot, does not: products on all cores lose more than what waits for
memory, so the ratio of a method with much of the latter is too good there. What a floor of one
model and size takes should be one number in a whole run, and tells when it is not, without a look
at the ratio.
"""

from collections.abc import Iterable

SLOWER = 0.06  # than the fastest floor of the same model and size


def disturbed(entries: Iterable[dict]) -> list[tuple[dict, float]]:
    """Measured entries whose floor was slower than others of its size by SLOWER, worst first.

    With each the seconds that its floor may take at the most. Copies are left out.
    """
    entries = [
        entry
        for entry in entries
        if entry["stats"] is not None and "copy_of" not in entry["extra_info"]
    ]
    allowed: dict[tuple, float] = {}
    for entry in entries:
        size, limit = floor_of(entry), seconds(entry) * (1 + SLOWER)
        allowed[size] = min(limit, allowed.get(size, limit))
    slow = [
        (entry, limit) for entry in entries if seconds(entry) > (limit := allowed[floor_of(entry)])
    ]
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
