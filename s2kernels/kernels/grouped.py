"""The slices of many adapters, each for its own tokens of a batch, in one launch.

For every token m of a group, over the entries e of that group,

    grouped_in_    y[m, :]           += sum over e of x[m, channels[e]] pool[rows[e], :]
    grouped_out_   y[m, channels[e]] += pool[rows[e], :] · x[m, :]

M tokens, N out_features, K in_features; the pool is (P, N) for in-slices, (P, K) for out-slices; R
entries of a group, its own number of them, which may be 0. `s2kernels.groups` says what a group is.

A program has a tile of tokens of one group: one token for decoding, 16 or 64 for more. It has a
block of y's columns in grouped_in_, and a block of the group's entries in grouped_out_: programs
beyond the entries of their group leave at once. Sums are in fp32 and rounded once, to y's dtype.
No two programs write to one place, so equal inputs give bit-equal results.
"""

import triton
import triton.language as tl
from torch import Tensor

from s2kernels.groups import Groups
from s2kernels.kernels.target import launch_parameters, on_device

# By the tokens of a tile. A sum over the entries of a group of decoding tokens is bound by the
# bytes of the pool: wide blocks of it, and few registers for the one token.
IN_LAUNCH = {
    1: {
        "half": dict(BLOCK_N=128, BLOCK_R=32, num_warps=4, num_stages=3),
        "float32": dict(BLOCK_N=128, BLOCK_R=16, num_warps=4, num_stages=2),
    },
    16: {
        "half": dict(BLOCK_N=128, BLOCK_R=32, num_warps=4, num_stages=3),
        "float32": dict(BLOCK_N=64, BLOCK_R=16, num_warps=4, num_stages=2),
    },
    64: {
        "half": dict(BLOCK_N=128, BLOCK_R=32, num_warps=8, num_stages=3),
        "float32": dict(BLOCK_N=64, BLOCK_R=16, num_warps=8, num_stages=2),
    },
}
OUT_LAUNCH = {
    1: {
        "half": dict(BLOCK_R=16, BLOCK_K=128, num_warps=4, num_stages=3),
        "float32": dict(BLOCK_R=16, BLOCK_K=64, num_warps=4, num_stages=2),
    },
    16: {
        "half": dict(BLOCK_R=32, BLOCK_K=64, num_warps=4, num_stages=3),
        "float32": dict(BLOCK_R=32, BLOCK_K=32, num_warps=4, num_stages=2),
    },
    64: {
        "half": dict(BLOCK_R=64, BLOCK_K=64, num_warps=8, num_stages=3),
        "float32": dict(BLOCK_R=32, BLOCK_K=32, num_warps=8, num_stages=2),
    },
}


# fmt: off
@triton.jit
def _grouped_in_kernel(
    x_ptr, pool_ptr, y_ptr, tiles_ptr, order_ptr, bounds_ptr, rows_ptr, channels_ptr,
    N,
    stride_xm, stride_xk,
    stride_pr, stride_pn,
    stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # fmt: on
    tile_ptr = tiles_ptr + tl.program_id(1) * 3
    group, place, count = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    first, last = tl.load(bounds_ptr + group * 2), tl.load(bounds_ptr + group * 2 + 1)
    if first == last:
        return

    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < count
    token = tl.load(order_ptr + place + offs_m, mask=mask_m, other=0).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_R):
        entry = start + tl.arange(0, BLOCK_R)
        mask_r = entry < last
        channel = tl.load(channels_ptr + entry, mask=mask_r, other=0).to(tl.int64)
        row = tl.load(rows_ptr + entry, mask=mask_r, other=0).to(tl.int64)
        a = tl.load(  # (BLOCK_M, BLOCK_R)
            x_ptr + token[:, None] * stride_xm + channel[None, :] * stride_xk,
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )
        b = tl.load(  # (BLOCK_R, BLOCK_N)
            pool_ptr + row[:, None] * stride_pr + offs_n[None, :] * stride_pn,
            mask=mask_r[:, None] & mask_n[None, :],
            other=0.0,
        )
        if BLOCK_M == 1:
            acc += tl.sum(tl.trans(a).to(tl.float32) * b.to(tl.float32), axis=0)[None, :]
        else:
            acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")

    y_ptrs = y_ptr + token[:, None] * stride_ym + offs_n[None, :] * stride_yn
    mask = mask_m[:, None] & mask_n[None, :]
    acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit
def _grouped_out_kernel(
    x_ptr, pool_ptr, y_ptr, tiles_ptr, order_ptr, bounds_ptr, rows_ptr, channels_ptr,
    K,
    stride_xm, stride_xk,
    stride_pr, stride_pk,
    stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    tile_ptr = tiles_ptr + tl.program_id(1) * 3
    group, place, count = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    first, last = tl.load(bounds_ptr + group * 2), tl.load(bounds_ptr + group * 2 + 1)
    first += tl.program_id(0) * BLOCK_R
    if first >= last:
        return

    entry = first + tl.arange(0, BLOCK_R)
    mask_r = entry < last
    row = tl.load(rows_ptr + entry, mask=mask_r, other=0).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < count
    token = tl.load(order_ptr + place + offs_m, mask=mask_m, other=0).to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < K
        a = tl.load(  # (BLOCK_M, BLOCK_K)
            x_ptr + token[:, None] * stride_xm + offs_k[None, :] * stride_xk,
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        b = tl.load(  # (BLOCK_R, BLOCK_K)
            pool_ptr + row[:, None] * stride_pr + offs_k[None, :] * stride_pk,
            mask=mask_r[:, None] & mask_k[None, :],
            other=0.0,
        )
        if BLOCK_M == 1:
            acc += tl.sum(a.to(tl.float32) * b.to(tl.float32), axis=1)[None, :]
        else:
            acc = tl.dot(a, tl.trans(b.to(a.dtype)), acc, input_precision="ieee")

    channel = tl.load(channels_ptr + entry, mask=mask_r, other=0).to(tl.int64)
    y_ptrs = y_ptr + token[:, None] * stride_ym + channel[None, :] * stride_yn
    mask = mask_m[:, None] & mask_r[None, :]
    acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def grouped_in_(y: Tensor, x: Tensor, pool: Tensor, groups: Groups) -> Tensor:
    """Add the in-slices of the groups' adapters to y (M, N), in place; x (M, K), pool (P, N).

    Returns y. Not differentiable.
    """
    launch = launch_parameters(IN_LAUNCH[groups.tokens.block], y.dtype)
    grid = (triton.cdiv(y.shape[1], launch["BLOCK_N"]), groups.tokens.tiles.shape[0])
    if groups.widest:
        _launch(_grouped_in_kernel, grid, y, x, pool, groups, y.shape[1], launch)
    return y


def grouped_out_(y: Tensor, x: Tensor, pool: Tensor, groups: Groups) -> Tensor:
    """Add the out-slices of the groups' adapters to y (M, N), in place; x (M, K), pool (P, K).

    Returns y. Not differentiable.
    """
    launch = launch_parameters(OUT_LAUNCH[groups.tokens.block], y.dtype)
    grid = (triton.cdiv(groups.widest, launch["BLOCK_R"]), groups.tokens.tiles.shape[0])
    if groups.widest:
        _launch(_grouped_out_kernel, grid, y, x, pool, groups, x.shape[1], launch)
    return y


def _launch(
    kernel: triton.JITFunction,
    grid: tuple[int, int],
    y: Tensor,
    x: Tensor,
    pool: Tensor,
    groups: Groups,
    size: int,
    launch: dict[str, int],
) -> None:
    if not grid[1]:
        return
    with on_device(y):
        kernel[grid](
            x, pool, y,
            groups.tokens.tiles, groups.tokens.order, groups.bounds, groups.rows, groups.channels,
            size,
            *x.stride(),
            *pool.stride(),
            *y.stride(),
            BLOCK_M=groups.tokens.block,
            **launch,
        )  # fmt: skip
