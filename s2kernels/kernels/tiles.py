"""Tile arithmetic that the matrix kernels share."""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(pid, num_rows, num_cols, GROUP: tl.constexpr):
    """(row, col) of tile number `pid`, in bands of GROUP rows that are walked column by column.

    Programs that run at the same time then share few rows and few columns of tiles, and find the
    operands of their neighbours in L2.
    """
    tiles_per_band = GROUP * num_cols
    first_row = (pid // tiles_per_band) * GROUP
    band_rows = min(num_rows - first_row, GROUP)
    pid_in_band = pid % tiles_per_band
    return first_row + pid_in_band % band_rows, pid_in_band // band_rows


@triton.jit
def column_halves(tile):
    """The left and the right half of a tile's columns: what is written by halves needs half the
    room in shared memory on its way out.
    """
    halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


def fitted_block(size: int, largest: int) -> int:
    """The block for a dimension of `size`: a power of two in [16, largest], 16 being tl.dot's."""
    return min(largest, max(16, triton.next_power_of_2(size)))
