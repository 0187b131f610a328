"""Scattered entries of a weight (N, K): what is the same for the plain-torch ops and the kernels.

An entry is named by its flat position, row * K + column. The positions of an index ascend, in the
order of the weight's rows, while a kernel computes tiles of dyᵀ x: a plan lists the tiles that hold
entries, and the entries of each. Plain torch, on whatever device the index is on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows and columns of a tile of the weight, as the kernel of sparse_grad computes it. The places in
# one fit 16 bits.
TILE = (128, 256)
# Tiles are numbered in bands of this many tile rows, column by column within a band: programs that
# run at the same time then share few rows and few columns, and find the operands in L2.
BAND = 8


@dataclass(frozen=True)
class TilePlan:
    """The entries of an index by tile; T tiles hold entries, k entries in all.

    shape:   (N, K) of the weight
    tiles:   (T,) int32, numbers of the tiles that hold entries, ascending
    offsets: (T + 1,) int32; tile i has the entries order[offsets[i] : offsets[i + 1]]
    order:   (k,) int32, which entry of the index, by tile and ascending within one
    places:  (k,) int16, in the same order: row * TILE[1] + column within the tile
    """

    shape: tuple[int, int]
    tiles: Tensor
    offsets: Tensor
    order: Tensor
    places: Tensor


def index_dtype(shape: tuple[int, int]) -> torch.dtype:
    """The dtype of flat positions in a weight of that shape: int32 where they fit."""
    return torch.int32 if shape[0] * shape[1] < 2**31 else torch.int64


def rows_and_columns(index: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries at index, int64."""
    index = index.long()
    return torch.div(index, K, rounding_mode="floor"), index % K


def largest(keys: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest keys and their positions, which ascend; of equal keys the first ones."""
    if len(keys) <= k:
        return keys, positions
    threshold = keys.topk(k, sorted=False).values.min()
    above, equal = keys > threshold, keys == threshold
    kept = above | (equal & (equal.cumsum(0) <= k - above.sum()))
    return keys[kept], positions[kept]


def tile_plan(index: Tensor, shape: tuple[int, int]) -> TilePlan:
    """The plan of `sparse_grad` for entries at `index` (k,), sorted, of a weight of `shape` (N, K).

    It keeps 6 bytes an entry and 8 a tile, on the device of index; making it needs O(k) bytes for a
    moment, and waits for the device once.
    """
    N, K = shape
    num_cols = -(-K // TILE[1])
    rows, cols = rows_and_columns(index, K)
    places = (rows % TILE[0] * TILE[1] + cols % TILE[1]).short()
    row_tile = torch.div(rows, TILE[0], rounding_mode="floor")
    col_tile = torch.div(cols, TILE[1], rounding_mode="floor")
    first_row = row_tile - row_tile % BAND
    band_rows = (-(-N // TILE[0]) - first_row).clamp_(max=BAND)
    number = first_row * num_cols + col_tile * band_rows + (row_tile - first_row)
    number, order = number.sort(stable=True)
    tiles, counts = torch.unique_consecutive(number, return_counts=True)
    offsets = torch.zeros(len(tiles) + 1, dtype=torch.int32, device=index.device)
    offsets[1:] = counts.cumsum(0)
    return TilePlan((N, K), tiles.int(), offsets, order.int(), places[order])
