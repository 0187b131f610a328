"""Overwrite the trained entries of every weight of a model, in one launch.

    weight[index // K, index % K] = base + delta

weight (N, K); index, base and delta (k,): the flat positions, the entries of W0 and their change.
The sum is in fp32 and rounded once, to the weight's dtype. Without deltas the entries of W0 are
copied bit for bit. As in slice_write, a table on the device says where every layer's tensors lie,
a map says which layer a block of entries is of, and neither autograd nor the version counters of
the weights see the write.

Limit: the memory of k scattered entries. Of each 32-byte sector of the weight one entry is wanted,
and the sector is read and written whole.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2kernels.kernels.target import launch_parameters, on_device

LAUNCH = {
    "half": dict(BLOCK=1024, num_warps=4),
    "float32": dict(BLOCK=1024, num_warps=4),
}


class _Place(NamedTuple):
    """Where a layer's tensors lie: a line of the table, whose fields the kernel reads by position.

    An address of 0 stands for an absent delta.
    """

    weight: int
    base: int
    delta: int
    positions: int
    num: int
    in_features: int
    stride_wn: int
    stride_wk: int
    stride_base: int
    stride_delta: int
    first_block: int = 0


# fmt: off
@triton.jit
def _sparse_write_kernel(
    table_ptr, layer_of_block_ptr,
    WEIGHT_DTYPE: tl.constexpr, BASE_DTYPE: tl.constexpr, DELTA_DTYPE: tl.constexpr,
    INDEX_DTYPE: tl.constexpr,
    NUM_FIELDS: tl.constexpr, HAS_DELTA: tl.constexpr, CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # fmt: on
    block = tl.program_id(0)
    entry = table_ptr + tl.load(layer_of_block_ptr + block).to(tl.int64) * NUM_FIELDS
    weight_ptr = tl.load(entry + 0).to(tl.pointer_type(WEIGHT_DTYPE))
    base_ptr = tl.load(entry + 1).to(tl.pointer_type(BASE_DTYPE))
    index_ptr = tl.load(entry + 3).to(tl.pointer_type(INDEX_DTYPE))
    offs = (block - tl.load(entry + 10)) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < tl.load(entry + 4)

    position = tl.load(index_ptr + offs, mask=mask, other=0).to(tl.int64)
    if CONTIGUOUS:
        weight_ptrs = weight_ptr + position
    else:
        in_features = tl.load(entry + 5)
        row, col = position // in_features, position % in_features
        weight_ptrs = weight_ptr + row * tl.load(entry + 6) + col * tl.load(entry + 7)
    value = tl.load(base_ptr + offs * tl.load(entry + 8), mask=mask)
    if HAS_DELTA:
        delta_ptr = tl.load(entry + 2).to(tl.pointer_type(DELTA_DTYPE))
        delta = tl.load(delta_ptr + offs * tl.load(entry + 9), mask=mask)
        total = value.to(tl.float32) + delta.to(tl.float32)
        tl.store(weight_ptrs, total.to(WEIGHT_DTYPE), mask=mask)
    else:
        tl.store(weight_ptrs, value.to(WEIGHT_DTYPE), mask=mask)


def sparse_write(
    weights: Sequence[Tensor],
    base: Sequence[Tensor],
    delta: Sequence[Tensor] | None,
    index: Sequence[Tensor],
) -> None:
    """Overwrite the entries at index[i] of weights[i] (N, K) with base[i] + delta[i], in place.

    base[i], delta[i], index[i] (k,); with delta=None the entries of W0 are put back bit for bit.
    One launch for each combination of device and dtypes.
    """
    deltas = [None] * len(weights) if delta is None else delta
    groups: dict[tuple, list[_Place]] = {}
    for weight, original, change, where in zip(weights, base, deltas, index, strict=True):
        change_dtype = torch.float32 if change is None else change.dtype
        group = (weight.device, where.dtype, weight.dtype, original.dtype, change_dtype)
        groups.setdefault(group, []).append(_place(weight, original, change, where))

    for (device, index_dtype, *dtypes), places in groups.items():
        # All three dtypes are asked about, so that one which the kernel does not take is refused.
        launch, *_ = [launch_parameters(LAUNCH, dtype) for dtype in dtypes]
        table, layer_of_block = _table(tuple(places), launch["BLOCK"], device)
        with on_device(table):
            _sparse_write_kernel[(layer_of_block.numel(),)](
                table,
                layer_of_block,
                *(_triton_dtype(dtype) for dtype in (*dtypes, index_dtype)),
                NUM_FIELDS=len(_Place._fields),
                HAS_DELTA=delta is not None,
                CONTIGUOUS=all(p.stride_wk == 1 and p.stride_wn == p.in_features for p in places),
                **launch,
            )


def _place(weight: Tensor, base: Tensor, delta: Tensor | None, index: Tensor) -> _Place:
    return _Place(
        weight.data_ptr(),
        base.data_ptr(),
        0 if delta is None else delta.data_ptr(),
        index.data_ptr(),
        index.shape[0],
        weight.shape[1],
        *weight.stride(),
        *base.stride(),
        *((0,) if delta is None else delta.stride()),
    )


# Recomputed checkpoints write layer by layer, and each layer has a table then: as many as large
# models have layers, lest every step copy them to the device.
@lru_cache(maxsize=1024)
def _table(
    places: tuple[_Place, ...], block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The device's copy of `places`, and the layer of every block of entries.

    The key is the whole content of the table, so a cached one cannot be stale, and a training
    loop, which writes the same tensors at every step, copies nothing to the device.
    """
    blocks = [triton.cdiv(p.num, block) for p in places]
    starts = [0, *accumulate(blocks)]
    rows = [p._replace(first_block=start) for p, start in zip(places, starts, strict=False)]
    # Explicitly on the CPU first: a default device that is set may be another, or meta.
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    layer_of_block = torch.arange(len(places), dtype=torch.int32, device="cpu").repeat_interleave(
        torch.tensor(blocks, device="cpu")
    )
    return table.to(device), layer_of_block.to(device)


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))
