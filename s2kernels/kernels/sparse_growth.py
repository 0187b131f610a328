"""The positions of the k largest scores of a weight, exactly, without N * K scores in memory.

    growth_candidates:  score[n, c] = |(dyᵀ x)[n, c]|       dy (M, N), x (M, K)
    sm3_growth:         score[n, c] = row[n] * col[c]       of the entries that are not active

Scores are computed tile by tile into a workspace and dropped again, as often as the search for the
largest ones asks for them: see `score_search`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2kernels.kernels.score_search import (
    BINS,
    BOUNDS,
    SCAN,
    Bounds,
    Buffers,
    Pass,
    largest_scores,
    read_scores,
)
from s2kernels.kernels.sparse_tile import (
    BLOCK_E,
    store_tile,
    tile_launch,
    workspace,
)
from s2kernels.kernels.target import on_device
from s2kernels.kernels.tiles import grouped_tile
from s2kernels.plan import BAND, TILE, tile_plan

# Smaller than the tile of a plan: counting takes registers beside the sums.
CANDIDATE_TILE = (64, 128)
PRODUCTS_LAUNCH = dict(num_warps=8)


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
        counts = read_scores(
            counts, workspace_ptr, row0, col0, keys_ptr, positions_ptr, found_ptr,
            first, shift, width, edge, last_row, capacity,
            N, K,
            COLLECT, ROWS, False,
            BLOCK_N, BLOCK_K, SCAN, BINS,
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
        counts = read_scores(
            counts, workspace_ptr, row0, col0, keys_ptr, positions_ptr, found_ptr,
            first, shift, width, edge, last_row, capacity,
            N, K,
            COLLECT, ROWS, True,
            BLOCK_N, BLOCK_K, SCAN, BINS,
        )  # fmt: skip
    if not COLLECT:
        tl.store(counts_ptr + program * BINS + tl.arange(0, BINS), counts)


def growth_candidates(dy: Tensor, x: Tensor, k: int) -> Tensor:
    """Positions of the k entries of largest |dyᵀ x|, ascending, for dy (M, N) and x (M, K).

    Of equal entries those of lowest position; NaN counts as the largest. 1 <= k <= N * K.
    Each pass takes as long as the dense gradient: there are two or three as a rule.
    """
    look, programs = candidate_passes(dy, x)
    with on_device(dy):
        return largest_scores(look, programs, (dy.shape[1], x.shape[1]), k, dy.device)


def sm3_growth(row: Tensor, col: Tensor, index: Tensor, k: int) -> Tensor:
    """The k positions not in index of largest row[n] * col[c], ascending; row (N,), col (K,), fp32.

    row and col are non-negative. Of equal products those of lowest position.
    1 <= k <= N * K - len(index).
    """
    look, programs = product_passes(row, col, index)
    with on_device(row):
        return largest_scores(look, programs, (row.shape[0], col.shape[0]), k, row.device)


def candidate_passes(dy: Tensor, x: Tensor) -> tuple[Pass, int]:
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


def product_passes(row: Tensor, col: Tensor, index: Tensor) -> tuple[Pass, int]:
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
