"""The k largest of scores that are computed tile by tile and never held all at once.

The bits of a number that is not negative are an integer in the same order, its key; the keys of NaN
are above all others. The k-th largest key is found digit by digit, from the top: one pass over the
tiles counts, for every value of a digit, the keys that agree in the digits above, and the counts
tell which value the wanted key has. As soon as few enough keys are left, one more pass collects
them, and a sort of these alone ends the search; mostly that is after one digit or two.

Of equal scores the lowest positions are taken. Where more of them are equal than may be collected,
as when all are zero, the row up to which they are wanted is found in the same way.

Counts are sums of integers, and what is collected is sorted: equal inputs give equal results.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2kernels.plan import TILE, index_dtype, largest

SCAN = 1024  # scores of a tile that are looked at together

KEY_BITS = 31
DIGIT_BITS = 11
BINS = 2**DIGIT_BITS
# What may be collected beyond 2 k: a tile.
SLACK = TILE[0] * TILE[1]
# The arguments that say what to count or collect: other ones in every pass, one compiled kernel.
BOUNDS = ("first", "shift", "width", "edge", "last_row", "capacity")


# fmt: off
@triton.jit
def _keys(
    workspace_ptr, row0, col0, start,
    N, K,
    INACTIVE: tl.constexpr, BLOCK_K: tl.constexpr, SCAN: tl.constexpr,
):
    # fmt: on
    """Keys, rows and columns of SCAN scores of the tile in the workspace; the key -1 is none."""
    offs = start + tl.arange(0, SCAN)
    rows, cols = row0 + offs // BLOCK_K, col0 + offs % BLOCK_K
    score = tl.load(workspace_ptr + offs)
    key = tl.abs(score).to(tl.int32, bitcast=True)
    wanted = (rows < N) & (cols < K)
    if INACTIVE:
        wanted &= score != -1.0
    return tl.where(wanted, key, -1), rows, cols


# fmt: off
@triton.jit
def _count(
    counts, workspace_ptr, row0, col0,
    first, shift, width, edge,
    N, K,
    INACTIVE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCAN: tl.constexpr, BINS: tl.constexpr,
):
    # fmt: on
    """counts + the keys of the tile in the workspace by key >> shift, from `first` to width more.

    With ROWS, the rows of the keys that are `edge`, in place of the keys.
    """
    for start in range(0, BLOCK_N * BLOCK_K, SCAN):
        number, rows, _ = _keys(workspace_ptr, row0, col0, start, N, K, INACTIVE, BLOCK_K, SCAN)
        if ROWS:
            number = tl.where(number == edge, rows, -1)
        digit = (number >> shift) - first
        wanted = (digit >= 0) & (digit < width)
        counts += tl.histogram(tl.where(wanted, digit, 0), BINS, mask=wanted)
    return counts


# fmt: off
@triton.jit
def _collect(
    workspace_ptr, row0, col0, keys_ptr, positions_ptr, found_ptr,
    edge, last_row, capacity,
    N, K,
    INACTIVE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCAN: tl.constexpr,
):
    # fmt: on
    """Appends the keys above `edge` of the tile in the workspace, those equal to it up to last_row.

    found_ptr counts what was appended by all programs.
    """
    for start in range(0, BLOCK_N * BLOCK_K, SCAN):
        key, rows, cols = _keys(workspace_ptr, row0, col0, start, N, K, INACTIVE, BLOCK_K, SCAN)
        wanted = (key > edge) | ((key == edge) & (rows <= last_row))
        # Few are wanted: an atomic for each costs less than to number them within the tile.
        place = tl.atomic_add(
            found_ptr + tl.zeros((SCAN,), tl.int32),
            tl.full((SCAN,), 1, tl.int64),
            mask=wanted,
            sem="relaxed",
        )
        wanted &= place < capacity
        tl.store(keys_ptr + place, key, mask=wanted)
        tl.store(positions_ptr + place, rows.to(tl.int64) * K + cols, mask=wanted)


# fmt: off
@triton.jit
def read_scores(
    counts, workspace_ptr, row0, col0, keys_ptr, positions_ptr, found_ptr,
    first, shift, width, edge, last_row, capacity,
    N, K,
    COLLECT: tl.constexpr, ROWS: tl.constexpr, INACTIVE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCAN: tl.constexpr, BINS: tl.constexpr,
):
    # fmt: on
    """What a pass does with the scores of the tile in the workspace: count, or collect.

    Returns counts (BINS,). With INACTIVE, a score of -1 stands for an entry that is left out.
    """
    if COLLECT:
        _collect(
            workspace_ptr, row0, col0, keys_ptr, positions_ptr, found_ptr,
            edge, last_row, capacity,
            N, K,
            INACTIVE, BLOCK_N, BLOCK_K, SCAN,
        )  # fmt: skip
    else:
        counts = _count(
            counts, workspace_ptr, row0, col0,
            first, shift, width, edge,
            N, K,
            INACTIVE, ROWS, BLOCK_N, BLOCK_K, SCAN, BINS,
        )  # fmt: skip
    return counts


class Buffers(NamedTuple):
    """Where a pass writes: counts (programs, BINS), or what it collects and how much it is."""

    counts: Tensor | None = None
    keys: Tensor | None = None
    positions: Tensor | None = None
    found: Tensor | None = None


class Bounds(NamedTuple):
    """What a pass counts or collects, in the order of BOUNDS."""

    first: int = 0
    shift: int = 0
    width: int = 0
    edge: int = 0
    last_row: int = 0
    capacity: int = 0


class Pass(Protocol):
    """One look at the scores of all tiles."""

    def __call__(self, buffers: Buffers, bounds: Bounds, **constants: bool) -> None: ...


def largest_scores(
    look: Pass, programs: int, shape: tuple[int, int], k: int, device: torch.device
) -> Tensor:
    """Positions of the k largest scores that `look` sees, ascending, in the dtype of an index.

    look is launched with `programs` programs on `device`; the scores are those of `shape`, (N, K).
    """
    enough = 2 * k + SLACK
    edge, above, equal = _find(look, programs, device, KEY_BITS, k, enough)
    last_row = shape[0]
    if above + equal > enough:
        row_bits = max(1, (shape[0] - 1).bit_length())
        last_row, before, equal = _find(look, programs, device, row_bits, k - above, 0, edge)
        equal += before
    capacity = above + equal
    keys = torch.empty(capacity, dtype=torch.int32, device=device)
    positions = torch.empty(capacity, dtype=torch.int64, device=device)
    found = torch.zeros((), dtype=torch.int64, device=device)
    bounds = Bounds(edge=edge, last_row=last_row, capacity=capacity)
    look(Buffers(None, keys, positions, found), bounds, COLLECT=True, ROWS=False)
    assert found.item() == capacity, "the scores changed between two passes"
    positions, order = positions.sort()
    return largest(keys[order], positions, k)[1].to(index_dtype(shape))


def _find(
    look: Pass,
    programs: int,
    device: torch.device,
    bits: int,
    num: int,
    enough: int,
    edge: int | None = None,
) -> tuple[int, int, int]:
    """Where the num-th largest key lies: (least key of a range, keys above it, keys in it).

    The range narrows until it and what is above it hold at most `enough` keys, or it is one key.
    With `edge`, the num-th smallest row among the keys that are edge, in place of the largest key.
    """
    prefix = passed = 0
    for shift, width in _digits(bits):
        counts = torch.empty((programs, BINS), dtype=torch.int32, device=device)
        bounds = Bounds(first=prefix * width, shift=shift, width=width, edge=edge or 0)
        look(Buffers(counts), bounds, COLLECT=False, ROWS=edge is not None)
        by_digit = counts.sum(0)[:width].tolist()
        digits = range(width) if edge is not None else range(width - 1, -1, -1)
        for digit in digits:
            if passed + by_digit[digit] >= num:
                break
            passed += by_digit[digit]
        prefix = prefix * width + digit
        if passed + by_digit[digit] <= enough:
            break
    return prefix << shift, passed, by_digit[digit]


def _digits(bits: int) -> Iterator[tuple[int, int]]:
    """(lowest bit, number of values) of each digit of a number, from the top."""
    while bits:
        width = min(bits, DIGIT_BITS)
        bits -= width
        yield bits, 2**width
