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


def fitted_block(size: int, largest: int) -> int:
    """The block for a dimension of `size`: a power of two in [16, largest], 16 being tl.dot's."""
    return min(largest, max(16, triton.next_power_of_2(size)))
