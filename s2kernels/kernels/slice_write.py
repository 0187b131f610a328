"""Overwrite the slice of every weight of a model, in one launch.

    weight[:, index] = base_slice + delta    dim="in",  base_slice and delta (N, R)
    weight[index, :] = base_slice + delta    dim="out", base_slice and delta (R, K)

weight (N, K): N out_features, K in_features, R trained channels. The sum is in fp32 and rounded
once, to the weight's dtype. Without a delta the base slice is copied bit for bit.

A model has tens to hundreds of slices, each too small to fill a GPU, so one launch covers them
all: a table on the device says where every slice lies, and a map says which slice a tile is of.
The launch writes raw memory: neither autograd nor the version counters of the weights see it.

Every tile decides for itself how wide its accesses are. They are of 16 bytes where the table says
that the columns of the slice lie side by side and aligned in memory, and where an index of columns
consists of aligned runs in that tile. Everywhere else they are of one element.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2kernels.kernels.target import launch_parameters, on_device

LAUNCH = {
    "half": dict(BLOCK_ROWS=32, BLOCK_COLS=64, num_warps=4),
    "float32": dict(BLOCK_ROWS=32, BLOCK_COLS=64, num_warps=4),
}

# Neighbours that are accessed together, if their first one lies at a multiple of as many: 16 bytes
# in half precision.
RUN = tl.constexpr(8)

# Lists that collect tables: see `keeping_tables`.
_keepers: list[list[Tensor]] = []


class _Place(NamedTuple):
    """Where one slice lies: a line of the table, whose fields the kernel reads by position.

    Rows and columns are those of the slice, not of the weight; an address of 0 stands for an
    absent tensor. A run of channels needs no index: the address of the weight is then that of its
    first channel.
    """

    weight: int
    base: int
    delta: int
    row_index: int
    column_index: int
    rows: int
    cols: int
    stride_wr: int
    stride_wc: int
    stride_br: int
    stride_bc: int
    stride_dr: int
    stride_dc: int
    first_tile: int = 0
    is_aligned: int = 0


# fmt: off
@triton.jit
def _write_tile(
    weight_ptr, base_ptr, delta_ptr, row_index, rows, offs_r, offs_c, weight_c, mask_c,
    stride_wr, stride_wc, stride_br, stride_bc, stride_dr, stride_dc, has_delta,
):
    # fmt: on
    mask_r, weight_r = offs_r < rows, offs_r
    if row_index != 0:
        row_index_ptr = row_index.to(tl.pointer_type(tl.int32))
        weight_r = tl.load(row_index_ptr + offs_r, mask=mask_r, other=0).to(tl.int64)
    mask = mask_r[:, None] & mask_c[None, :]
    weight_ptrs = weight_ptr + weight_r[:, None] * stride_wr + weight_c[None, :] * stride_wc
    base_ptrs = base_ptr + offs_r[:, None] * stride_br + offs_c[None, :] * stride_bc
    dtype = weight_ptr.dtype.element_ty
    base = tl.load(base_ptrs, mask=mask)
    if has_delta:
        delta_ptrs = delta_ptr + offs_r[:, None] * stride_dr + offs_c[None, :] * stride_dc
        total = base.to(tl.float32) + tl.load(delta_ptrs, mask=mask).to(tl.float32)
        tl.store(weight_ptrs, total.to(dtype), mask=mask)
    else:
        tl.store(weight_ptrs, base.to(dtype), mask=mask)


# fmt: off
@triton.jit
def _slice_write_kernel(
    table_ptr, slice_of_tile_ptr,
    WEIGHT_DTYPE: tl.constexpr, BASE_DTYPE: tl.constexpr, DELTA_DTYPE: tl.constexpr,
    NUM_FIELDS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):
    # fmt: on
    tile = tl.program_id(0)
    entry = table_ptr + tl.load(slice_of_tile_ptr + tile).to(tl.int64) * NUM_FIELDS
    weight_ptr = tl.load(entry + 0).to(tl.pointer_type(WEIGHT_DTYPE))
    base_ptr = tl.load(entry + 1).to(tl.pointer_type(BASE_DTYPE))
    delta_address = tl.load(entry + 2)
    delta_ptr = delta_address.to(tl.pointer_type(DELTA_DTYPE))
    has_delta = delta_address != 0
    row_index, column_index = tl.load(entry + 3), tl.load(entry + 4)
    rows, cols = tl.load(entry + 5), tl.load(entry + 6)
    stride_wr, stride_wc = tl.load(entry + 7), tl.load(entry + 8)
    stride_br, stride_bc = tl.load(entry + 9), tl.load(entry + 10)
    stride_dr, stride_dc = tl.load(entry + 11), tl.load(entry + 12)
    tile -= tl.load(entry + 13)
    is_wide = tl.load(entry + 14) != 0

    tiles_c = tl.cdiv(cols, BLOCK_COLS)
    first_r = (tile // tiles_c) * BLOCK_ROWS
    offs_c = (tile % tiles_c) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask_c, weight_c = offs_c < cols, offs_c
    first_c = offs_c  # where the run of a column begins, or any column of it
    if column_index != 0:
        column_index_ptr = column_index.to(tl.pointer_type(tl.int32))
        weight_c = tl.load(column_index_ptr + offs_c, mask=mask_c, other=0).to(tl.int64)
        if is_wide:
            first_ptrs = column_index_ptr + offs_c // RUN * RUN
            first_c = tl.load(first_ptrs, mask=mask_c, other=0).to(tl.int64)
            in_run = (first_c % RUN == 0) & (weight_c == first_c + offs_c % RUN)
            is_wide = tl.min((in_run | ~mask_c).to(tl.int32), 0) != 0

    # fmt: off
    if is_wide:
        # What the compiler cannot know of numbers read from memory, and needs for wide accesses.
        _write_tile(
            tl.multiple_of(weight_ptr, 16), tl.multiple_of(base_ptr, 16),
            tl.multiple_of(delta_ptr, 16), row_index, rows,
            first_r + tl.arange(0, BLOCK_ROWS), offs_c,
            tl.max_contiguous(tl.multiple_of(first_c // RUN * RUN + offs_c % RUN, RUN), RUN),
            offs_c < tl.multiple_of(cols, RUN),
            tl.multiple_of(stride_wr, RUN), 1, tl.multiple_of(stride_br, RUN), 1,
            tl.multiple_of(stride_dr, RUN), 1, has_delta,
        )
    else:
        # In parts: the compiler gives all accesses of one shape the layout of the widest of them,
        # which would scatter these. Fewer rows at a time need fewer registers, too.
        NUM_ROWS: tl.constexpr = BLOCK_ROWS // 4
        for part in range(4):
            _write_tile(
                weight_ptr, base_ptr, delta_ptr, row_index, rows,
                first_r + part * NUM_ROWS + tl.arange(0, NUM_ROWS), offs_c, weight_c, mask_c,
                stride_wr, stride_wc, stride_br, stride_bc, stride_dr, stride_dc, has_delta,
            )
    # fmt: on


def slice_write(
    weights: Sequence[Tensor],
    base_slices: Sequence[Tensor],
    deltas: Sequence[Tensor | None],
    indices: Sequence[Tensor | slice],
    dims: Sequence[str],
) -> None:
    """Overwrite the slice of every weight with base_slice + delta, in place.

    weights (N, K); base_slices and deltas (N, R) for dim="in", (R, K) for dim="out"; a delta of
    None restores the base slice bit for bit. One launch for each combination of device and dtypes.
    """
    slice_writer(weights, base_slices, deltas, indices, dims)()


def slice_writer(
    weights: Sequence[Tensor],
    base_slices: Sequence[Tensor],
    deltas: Sequence[Tensor | None],
    indices: Sequence[Tensor | slice],
    dims: Sequence[str],
) -> Callable[[], None]:
    """`slice_write` of these tensors, to be called as often as is wanted while they stay where they
    lie in memory: the tables are made once.
    """
    given = [delta for delta in deltas if delta is not None]
    any_delta_dtype = given[0].dtype if given else torch.float32
    groups: dict[tuple, list[_Place]] = {}
    for weight, base, delta, index, dim in zip(
        weights, base_slices, deltas, indices, dims, strict=True
    ):
        # A slice without a delta fits the group of any delta dtype.
        delta_dtype = any_delta_dtype if delta is None else delta.dtype
        group = (weight.device, weight.dtype, base.dtype, delta_dtype)
        groups.setdefault(group, []).append(_place(weight, base, delta, index, dim))

    prepared = []
    for (device, *dtypes), places in groups.items():
        # All three dtypes are asked about, so that one which the kernel does not take is refused.
        launch, *_ = [launch_parameters(LAUNCH, dtype) for dtype in dtypes]
        tables = _table(tuple(places), launch["BLOCK_ROWS"], launch["BLOCK_COLS"], device)
        names = [getattr(tl, str(dtype).removeprefix("torch.")) for dtype in dtypes]
        prepared.append((tables, names, launch))

    def write() -> None:
        for tables, names, launch in prepared:
            for kept in _keepers:
                kept += tables
            table, slice_of_tile = tables
            with on_device(table):
                _slice_write_kernel[(slice_of_tile.numel(),)](
                    table, slice_of_tile, *names, NUM_FIELDS=len(_Place._fields), **launch
                )

    return write


@contextmanager
def keeping_tables() -> Iterator[list[Tensor]]:
    """Collects the tables of the launches within.

    A CUDA graph launches with their addresses again, when the cache of `_table` may have dropped
    them: whoever records one holds on to the list. Of all threads, as a backward has its own.
    """
    kept: list[Tensor] = []
    _keepers.append(kept)
    try:
        yield kept
    finally:
        _keepers.pop()


def _place(
    weight: Tensor, base: Tensor, delta: Tensor | None, index: Tensor | slice, dim: str
) -> _Place:
    weight_address, axis = weight.data_ptr(), 1 if dim == "in" else 0
    row_index = column_index = 0
    if isinstance(index, slice):
        weight_address += index.start * weight.stride(axis) * weight.element_size()
    elif axis == 1:
        column_index = index.data_ptr()
    else:
        row_index = index.data_ptr()
    return _Place(
        weight_address,
        base.data_ptr(),
        0 if delta is None else delta.data_ptr(),
        row_index,
        column_index,
        *base.shape,
        *weight.stride(),
        *base.stride(),
        *((0, 1) if delta is None else delta.stride()),
    )


# Recomputed checkpoints write layer by layer, and each layer has a table then: as many as large
# models have layers, lest every step copy them to the device, which waits, and cannot be recorded.
@lru_cache(maxsize=1024)
def _table(
    places: tuple[_Place, ...], block_rows: int, block_cols: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The device's copy of `places`, complete, and the slice of every tile.

    The key is the whole content of the table, so a cached one cannot be stale, and a training
    loop, which writes the same tensors at every step, copies nothing to the device.
    """
    tiles = [triton.cdiv(p.rows, block_rows) * triton.cdiv(p.cols, block_cols) for p in places]
    starts = [0, *accumulate(tiles)]
    rows = [
        p._replace(first_tile=start, is_aligned=_is_aligned(p))
        for p, start in zip(places, starts, strict=False)
    ]
    # Explicitly on the CPU first: a default device that is set may be another, or meta.
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    slice_of_tile = torch.arange(len(places), dtype=torch.int32, device="cpu").repeat_interleave(
        torch.tensor(tiles, device="cpu")
    )
    return table.to(device), slice_of_tile.to(device)


def _is_aligned(place: _Place) -> bool:
    """Whether RUN columns from a multiple of RUN on can be read and written together, in every row
    of the slice; those of the weight if an index has them side by side.
    """
    p = place
    return (
        p.stride_wc == p.stride_bc == p.stride_dc == 1
        and all(address % 16 == 0 for address in (p.weight, p.base, p.delta))
        and all(n % RUN.value == 0 for n in (p.cols, p.stride_wr, p.stride_br, p.stride_dr))
    )
