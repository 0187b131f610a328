"""The positions of the k largest scores of a weight, exactly, without N * K scores in memory.

    growth_candidates:  score[n, c] = |(dyᵀ x)[n, c]|       dy (M, N), x (M, K)
    sm3_growth:         score[n, c] = row[n] * col[c]       of the entries that are not active

Scores are computed tile by tile into a workspace and dropped again, as often as they are needed.
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

from s2kernels.kernels.sparse_tile import (
    BLOCK_E,
    store_tile,
    tile_launch,
    workspace,
)
from s2kernels.kernels.target import on_device
from s2kernels.kernels.tiles import grouped_tile
from s2kernels.plan import BAND, TILE, index_dtype, largest, tile_plan

# Smaller than the tile of a plan: counting takes registers beside the sums.
CANDIDATE_TILE = (64, 128)
PRODUCTS_LAUNCH = dict(num_warps=8)
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
@triton.jit(do_not_specialize=BOUNDS)
def _growth_candidates_kernel(
    dy_ptr, x_ptr, workspace_ptr,
    counts_ptr, keys_ptr, positions_ptr, found_ptr,
    M, N, K,
    stride_dm, stride_dn,
    stride_xm, stride_xk,
    first, shift, width, edge, last_row, capacity,
    COLLECT: tl.constexpr, ROWS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    SCAN: tl.constexpr, BINS: tl.constexpr,
):
    # fmt: on
    program = tl.program_id(0)
    workspace_ptr += program.to(tl.int64) * (BLOCK_N * BLOCK_K)
    counts = tl.zeros((BINS,), tl.int32)
    num_tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(K, BLOCK_K)
    for number in range(program, num_tiles, tl.num_programs(0)):
        row0, col0 = store_tile(
            dy_ptr, x_ptr, workspace_ptr,
            number, 0, M,
            M, N, K,
            stride_dm, stride_dn,
            stride_xm, stride_xk,
            DESCRIPTORS,
            BLOCK_M, BLOCK_N, BLOCK_K, BAND,
        )  # fmt: skip
        if COLLECT:
            _collect(
                workspace_ptr, row0, col0, keys_ptr, positions_ptr, found_ptr,
                edge, last_row, capacity,
                N, K,
                False, BLOCK_N, BLOCK_K, SCAN,
            )  # fmt: skip
        else:
            counts = _count(
                counts, workspace_ptr, row0, col0,
                first, shift, width, edge,
                N, K,
                False, ROWS, BLOCK_N, BLOCK_K, SCAN, BINS,
            )  # fmt: skip
    if not COLLECT:
        tl.store(counts_ptr + program * BINS + tl.arange(0, BINS), counts)


# fmt: off
@triton.jit(do_not_specialize=BOUNDS)
def _sm3_growth_kernel(
    row_ptr, col_ptr, offsets_ptr, places_ptr, workspace_ptr,
    counts_ptr, keys_ptr, positions_ptr, found_ptr,
    N, K,
    stride_row, stride_col,
    first, shift, width, edge, last_row, capacity,
    COLLECT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    BLOCK_E: tl.constexpr, SCAN: tl.constexpr, BINS: tl.constexpr,
):
    # fmt: on
    program = tl.program_id(0)
    workspace_ptr += program.to(tl.int64) * (BLOCK_N * BLOCK_K)
    counts = tl.zeros((BINS,), tl.int32)
    tile_rows, tile_cols = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    for number in range(program, tile_rows * tile_cols, tl.num_programs(0)):
        tile_row, tile_col = grouped_tile(number, tile_rows, tile_cols, BAND)
        row0, col0 = tile_row * BLOCK_N, tile_col * BLOCK_K
        # The program may still be reading the tile before this one.
        tl.debug_barrier()
        for start in range(0, BLOCK_N * BLOCK_K, SCAN):
            local = start + tl.arange(0, SCAN)
            rows, cols = row0 + local // BLOCK_K, col0 + local % BLOCK_K
            row = tl.load(row_ptr + rows.to(tl.int64) * stride_row, mask=rows < N, other=0.0)
            col = tl.load(col_ptr + cols.to(tl.int64) * stride_col, mask=cols < K, other=0.0)
            tl.store(workspace_ptr + local, row * col)
        tl.debug_barrier()
        last = tl.load(offsets_ptr + number + 1)
        for start in range(tl.load(offsets_ptr + number), last, BLOCK_E):
            offs = start + tl.arange(0, BLOCK_E)
            places = tl.load(places_ptr + offs, mask=offs < last, other=0)
            # No product of the statistics is negative.
            tl.store(workspace_ptr + places, -1.0, mask=offs < last)
        tl.debug_barrier()
        if COLLECT:
            _collect(
                workspace_ptr, row0, col0, keys_ptr, positions_ptr, found_ptr,
                edge, last_row, capacity,
                N, K,
                True, BLOCK_N, BLOCK_K, SCAN,
            )  # fmt: skip
        else:
            counts = _count(
                counts, workspace_ptr, row0, col0,
                first, shift, width, edge,
                N, K,
                True, ROWS, BLOCK_N, BLOCK_K, SCAN, BINS,
            )  # fmt: skip
    if not COLLECT:
        tl.store(counts_ptr + program * BINS + tl.arange(0, BINS), counts)


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


class _Pass(Protocol):
    """One look at the scores of all tiles."""

    def __call__(self, buffers: Buffers, bounds: Bounds, **constants: bool) -> None: ...


def growth_candidates(dy: Tensor, x: Tensor, k: int) -> Tensor:
    """Positions of the k entries of largest |dyᵀ x|, ascending, for dy (M, N) and x (M, K).

    Of equal entries those of lowest position; NaN counts as the largest. 1 <= k <= N * K.
    Each pass takes as long as the dense gradient: there are two or three as a rule.
    """
    look, programs = candidate_passes(dy, x)
    with on_device(dy):
        return _largest_scores(look, programs, (dy.shape[1], x.shape[1]), k, dy.device)


def sm3_growth(row: Tensor, col: Tensor, index: Tensor, k: int) -> Tensor:
    """The k positions not in index of largest row[n] * col[c], ascending; row (N,), col (K,), fp32.

    row and col are non-negative. Of equal products those of lowest position.
    1 <= k <= N * K - len(index).
    """
    look, programs = product_passes(row, col, index)
    with on_device(row):
        return _largest_scores(look, programs, (row.shape[0], col.shape[0]), k, row.device)


def candidate_passes(dy: Tensor, x: Tensor) -> tuple[_Pass, int]:
    """What launches one pass over the tiles of dyᵀ x, and the number of its programs."""
    (M, N), K = dy.shape, x.shape[1]
    num_tiles = triton.cdiv(N, CANDIDATE_TILE[0]) * triton.cdiv(K, CANDIDATE_TILE[1])
    operands, tiles, launch = tile_launch(dy, x, CANDIDATE_TILE, num_tiles)
    programs = tiles.shape[0]

    def look(buffers: Buffers, bounds: Bounds, **constants: bool) -> None:
        _growth_candidates_kernel[(programs,)](
            *operands, tiles,
            *buffers,
            M, N, K,
            *dy.stride(),
            *x.stride(),
            *bounds,
            SCAN=SCAN, BINS=BINS,
            **constants,
            **launch,
        )  # fmt: skip

    return look, programs


def product_passes(row: Tensor, col: Tensor, index: Tensor) -> tuple[_Pass, int]:
    """The same over the tiles of row[n] * col[c] outside of index."""
    N, K = row.shape[0], col.shape[0]
    num_tiles = triton.cdiv(N, TILE[0]) * triton.cdiv(K, TILE[1])
    tiles = workspace(row.device, TILE, num_tiles)
    programs = tiles.shape[0]
    plan = tile_plan(index, (N, K))
    numbers = torch.arange(num_tiles + 1, dtype=torch.int32, device=row.device)
    offsets = plan.offsets[torch.searchsorted(plan.tiles, numbers)]  # of every tile

    def look(buffers: Buffers, bounds: Bounds, **constants: bool) -> None:
        _sm3_growth_kernel[(programs,)](
            row, col, offsets, plan.places, tiles,
            *buffers,
            N, K,
            *row.stride(), *col.stride(),
            *bounds,
            BLOCK_N=TILE[0], BLOCK_K=TILE[1], BAND=BAND,
            BLOCK_E=BLOCK_E, SCAN=SCAN, BINS=BINS,
            **constants,
            **PRODUCTS_LAUNCH,
        )  # fmt: skip

    return look, programs


def _largest_scores(
    look: _Pass, programs: int, shape: tuple[int, int], k: int, device: torch.device
) -> Tensor:
    """Positions of the k largest scores that `look` sees, ascending."""
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
    look: _Pass,
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
