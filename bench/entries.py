"""What the trained entries of SpIEL take, in bytes: so many each, and next to nothing besides.

Of k entries of a weight (N, K), with i bytes of a position (4, or 8 from N * K = 2**31 on) and s of
a number of the model:

    held with the model     4 k delta, i k positions, s k entries of W0, the plan of their tiles
    gradient                4 k
    AdamW, per-entry ages   12 k
    while gradients are watched (SpIEL-AG):  i k candidates, 8 k sums, their plan; 4 k within a step
    in the optimizer's step 8 k for AdamW
    SM3 (SpIEL-MA)          4 (N + K) in the place of AdamW's 12 k; nothing is watched

A plan takes 6 k and 8 for each tile with entries. With 4 bytes for i and s that is 64 k for AG, and
for MA 22 k and what SM3 works with, 32 k of one layer at a time. Nothing has the size N * K. A step
in which candidates are named, the first of a window, needs more for a moment: that of one layer.
"""

from s2kernels.peft.spiel.gradient_window import NUM_PROBES
from s2kernels.plan import TILE, index_dtype

Shape = tuple[int, int]  # (N, K)

FINGERPRINT = 8
AGED_ADAMW = 12  # bytes of an entry: two averages and an age, fp32
ADAMW_WORKS_WITH = 8  # bytes of an entry, of all layers at once
SM3_WORKS_WITH = 32  # bytes of an entry, of one layer: rows and columns, int64, and fp32 numbers
# Numbers of an entry that a step of the optimizer reads and writes, in single operators.
MOVES = {"spiel": 38, "spiel_ma": 40}


def position_bytes(shape: Shape) -> int:
    return index_dtype(shape).itemsize


def plan_bytes(shape: Shape, entries: int) -> int:
    """Of `s2kernels.plan.TilePlan`, where as many tiles hold entries as can."""
    tiles = -(-shape[0] // TILE[0]) * -(-shape[1] // TILE[1])
    return 6 * entries + 8 * min(tiles, entries) + 4


def held_bytes(shape: Shape, entries: int, itemsize: int) -> int:
    """Beside the weight, all the time, the delta left out: it is a parameter."""
    each = position_bytes(shape) + itemsize
    return each * entries + FINGERPRINT + plan_bytes(shape, entries)


def state_bytes(shape: Shape, entries: int, method: str) -> int:
    """Between steps: of the optimizer and, for "spiel", of a window with watched gradients."""
    if method == "spiel_ma":
        return 4 * sum(shape)
    probes = min(NUM_PROBES, entries)
    watched = (position_bytes(shape) + 8) * entries + plan_bytes(shape, entries)
    watched += (position_bytes(shape) + 8) * probes + plan_bytes(shape, probes)
    return AGED_ADAMW * entries + watched


def watched_bytes(entries: int, method: str) -> int:
    """From a backward to the end of its step: gradients of candidates and of probes."""
    return 0 if method == "spiel_ma" else 4 * (entries + min(NUM_PROBES, entries))


def working_bytes(entries: list[int], method: str) -> int:
    """In a step of the optimizer, besides gradients and states; entries: of each layer."""
    if method == "spiel_ma":
        return SM3_WORKS_WITH * max(entries)
    return ADAMW_WORKS_WITH * sum(entries)
