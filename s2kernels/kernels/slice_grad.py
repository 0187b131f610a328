"""Gradient of a slice of the weight.

    dim="in":   d_delta = dyᵀ x[:, index]    (N, R)
    dim="out":  d_delta = dy[:, index]ᵀ x    (R, K)

M tokens, N out_features, K in_features, R trained channels. Both are one kernel: the product of a
wide operand (M, P) and a slice operand (M, R), wideᵀ slice, written as it is or transposed through
the strides of the output. The slice is always the second factor of the dot, so a small R gives a
narrow tile and never one below the 64 rows that wgmma needs.

P/128 x R/128 tiles are far fewer than the multiprocessors of a GPU, while M is long: the tokens
are split over programs, each of which writes a partial sum in fp32, and a second kernel adds the
partial sums in a fixed order. There are no atomics: equal inputs give bit-equal gradients.

The gradient is written, added to one that is there, or used up by the moments of AdamW: the last
kernel that holds a tile of it does either (`s2kernels.kernels.adamw`).

Limit: the bytes of the wide operand, M P elements read once (R up to 128), below some 200 channels;
2 M P R FLOPs above.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2kernels.kernels.adamw import update_moments
from s2kernels.kernels.target import launch_parameters, num_sms, on_device, tuned_parameters
from s2kernels.kernels.tiles import fitted_block, grouped_tile
from s2kernels.moments import Moments

# BLOCK_R is the largest one; fitted_block takes a smaller one for a smaller slice.
LAUNCH = {
    "half": dict(BLOCK_M=64, BLOCK_P=128, BLOCK_R=128, GROUP_P=8, num_warps=8, num_stages=3),
    "float32": dict(BLOCK_M=16, BLOCK_P=64, BLOCK_R=64, GROUP_P=8, num_warps=8, num_stages=2),
}
# For slices of at most NARROW channels.
NARROW = 32
NARROW_LAUNCH = {
    "half": dict(BLOCK_M=64, BLOCK_P=128, BLOCK_R=32, GROUP_P=8, num_warps=4, num_stages=3),
    "float32": dict(BLOCK_M=16, BLOCK_P=64, BLOCK_R=32, GROUP_P=8, num_warps=4, num_stages=2),
}
REDUCE_LAUNCH = dict(BLOCK=1024, num_warps=4)

# Fewer tokens than this a program, and writing and adding partial sums costs more than it saves.
MIN_TOKENS_PER_SPLIT = 256


# fmt: off
@triton.jit
def _slice_grad_kernel(
    wide_ptr, slice_ptr, index_ptr, out_ptr, exp_avg_sq_ptr,
    M, P, R, tokens_per_split,
    stride_wm, stride_wp,
    stride_sm, stride_sr,
    stride_split, stride_op, stride_or,
    ACCUMULATE: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_P: tl.constexpr,
):
    # fmt: on
    pid_p, pid_r = grouped_tile(
        tl.program_id(0), tl.cdiv(P, BLOCK_P), tl.cdiv(R, BLOCK_R), GROUP_P
    )
    split = tl.program_id(1)
    offs_p = pid_p.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_r = pid_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_p, mask_r = offs_p < P, offs_r < R
    channels = offs_r
    if index_ptr is not None:
        channels = tl.load(index_ptr + offs_r, mask=mask_r, other=0).to(tl.int64)

    # The last split may be short: both operands are zero from M on.
    first = split * tokens_per_split
    acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for start in range(first, min(first + tokens_per_split, M), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m[:, None] < M
        wide = tl.load(  # (BLOCK_M, BLOCK_P)
            wide_ptr + offs_m[:, None] * stride_wm + offs_p[None, :] * stride_wp,
            mask=mask_m & mask_p[None, :],
            other=0.0,
        )
        part = tl.load(  # (BLOCK_M, BLOCK_R)
            slice_ptr + offs_m[:, None] * stride_sm + channels[None, :] * stride_sr,
            mask=mask_m & mask_r[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(wide), part, acc, input_precision="ieee")

    out_ptrs = (
        out_ptr
        + split.to(tl.int64) * stride_split
        + offs_p[:, None] * stride_op
        + offs_r[None, :] * stride_or
    )
    mask = mask_p[:, None] & mask_r[None, :]
    if exp_avg_sq_ptr is not None:
        exp_avg_sq_ptrs = (
            exp_avg_sq_ptr + offs_p[:, None] * stride_op + offs_r[None, :] * stride_or
        )
        update_moments(acc, out_ptrs, exp_avg_sq_ptrs, mask, BETA1, BETA2)
    else:
        if ACCUMULATE:
            acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit
def _reduce_kernel(
    partial_ptr, out_ptr, exp_avg_sq_ptr,
    num_splits, rows, cols,
    stride_or, stride_oc,
    ACCUMULATE: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # fmt: on
    # not rows.to(tl.int64): a size of 1 is no tensor, but a Python int
    size = (tl.zeros((), tl.int64) + rows) * cols
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(num_splits):
        acc += tl.load(partial_ptr + split * size + offs, mask=mask, other=0.0)
    where = (offs // cols) * stride_or + (offs % cols) * stride_oc
    if exp_avg_sq_ptr is not None:
        update_moments(acc, out_ptr + where, exp_avg_sq_ptr + where, mask, BETA1, BETA2)
    else:
        if ACCUMULATE:
            acc += tl.load(out_ptr + where, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=mask)


def slice_grad(
    dy: Tensor,
    x: Tensor,
    index: Tensor | slice | None,
    dim: str,
    out: Tensor | Moments | None = None,
) -> Tensor:
    """dyᵀ x[:, index] (N, R) for dim="in", dy[:, index]ᵀ x (R, K) for dim="out".

    dy (M, N), x (M, K); with index=None the operand that would be gathered is the compact (M, R).
    Returns it in fp32, or adds it into `out`, of any floating dtype, and returns `out`, or uses it
    up in `out`, the moments of AdamW, and returns the first of them.
    """
    exp_avg_sq, beta1, beta2 = None, None, None
    if isinstance(out, Moments):
        out.check(dy)
        out, exp_avg_sq, (beta1, beta2) = out
    wide, part = (dy, x) if dim == "in" else (x, dy)
    if isinstance(index, slice):
        part, index = part[:, index], None  # a run of channels is a view
    (M, P), R = wide.shape, part.shape[1] if index is None else index.shape[0]
    shape = (P, R) if dim == "in" else (R, P)
    table = NARROW_LAUNCH if R <= NARROW else LAUNCH
    default = launch_parameters(table, wide.dtype)
    launch = dict(tuned_parameters("slice_grad", wide, (P, R), M, default))
    launch["BLOCK_R"] = fitted_block(R, launch["BLOCK_R"])
    measured_splits = launch.pop("SPLITS", None)

    accumulate = out is not None
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=wide.device)
    tiles = triton.cdiv(P, launch["BLOCK_P"]) * triton.cdiv(R, launch["BLOCK_R"])
    num_splits, tokens_per_split = _split(
        M, measured_splits or _choose_splits(M, tiles, num_sms(wide.device)), launch["BLOCK_M"]
    )
    target = out
    if num_splits > 1:
        target = torch.empty((num_splits, *shape), dtype=torch.float32, device=wide.device)
    stride_op, stride_or = target.stride()[-2:] if dim == "in" else target.stride()[:-3:-1]

    with on_device(wide):
        _slice_grad_kernel[(tiles, num_splits)](
            wide, part, index, target, exp_avg_sq if num_splits == 1 else None,
            M, P, R, tokens_per_split,
            *wide.stride(),
            *part.stride(),
            P * R, stride_op, stride_or,
            ACCUMULATE=accumulate and num_splits == 1,
            BETA1=beta1,
            BETA2=beta2,
            **launch,
        )  # fmt: skip
        if num_splits > 1:
            _reduce_kernel[(triton.cdiv(P * R, REDUCE_LAUNCH["BLOCK"]),)](
                target, out, exp_avg_sq,
                num_splits, *shape,
                *out.stride(),
                ACCUMULATE=accumulate,
                BETA1=beta1,
                BETA2=beta2,
                **REDUCE_LAUNCH,
            )  # fmt: skip
    return out


def _choose_splits(num_tokens: int, tiles: int, programs: int) -> int:
    """So many that tiles x splits is the most that `programs` runs at once, and that each has
    MIN_TOKENS_PER_SPLIT tokens or more.
    """
    return max(1, min(programs // max(tiles, 1), num_tokens // MIN_TOKENS_PER_SPLIT))


def _split(num_tokens: int, splits: int, block: int) -> tuple[int, int]:
    """(splits, tokens of each): a whole number of blocks each, at most `splits`, none empty."""
    tokens = max(block, triton.cdiv(triton.cdiv(num_tokens, splits), block) * block)
    return max(1, triton.cdiv(num_tokens, tokens)), tokens
