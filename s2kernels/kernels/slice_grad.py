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

The gradient is written, added to one that is there, or used up by a step of AdamW, which writes the
weight's slice, too (`s2kernels.kernels.adamw`). The last kernel that holds a tile of it does that.

Limit: the bytes of the wide operand, M P elements read once (R up to 128), below some 200 channels;
2 M P R FLOPs above.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2kernels.kernels.adamw import adamw_tile
from s2kernels.kernels.target import launch_parameters, num_sms, on_device, tuned_parameters
from s2kernels.kernels.tiles import column_halves, fitted_block, grouped_tile
from s2kernels.update import Update

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

# exp_avg, exp_avg_sq, coefficients, eps, weight, base and where of `Update`
NO_UPDATE = (None,) * 7

# Fewer tokens than this a program, and writing and adding partial sums costs more than it saves.
MIN_TOKENS_PER_SPLIT = 256


# fmt: off
@triton.jit
def _slice_grad_kernel(
    wide_ptr, slice_ptr, index_ptr, out_ptr,
    M, P, R, tokens_per_split,
    stride_wm, stride_wp,
    stride_sm, stride_sr,
    stride_split, stride_op, stride_or,
    exp_avg_ptr, exp_avg_sq_ptr, coefficients_ptr, eps,
    weight_ptr, base_ptr, where_ptr, stride_weight_p, stride_weight_r,
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

    if exp_avg_ptr is not None:
        # By quarters of a wide tile: the addresses of all that a step reads take many registers.
        NUM_PARTS: tl.constexpr = 4 if BLOCK_R > 32 else 1
        WIDTH: tl.constexpr = BLOCK_R // NUM_PARTS
        left, right, part = acc, acc, acc
        if NUM_PARTS == 4:
            left, right = column_halves(acc)
        for i in tl.static_range(NUM_PARTS):
            if NUM_PARTS == 4:
                first, second = column_halves(left if i < 2 else right)
                part = first if i % 2 == 0 else second
            offs_r = pid_r.to(tl.int64) * BLOCK_R + i * WIDTH + tl.arange(0, WIDTH)
            mask_r = offs_r < R
            offs = offs_p[:, None] * stride_op + offs_r[None, :] * stride_or
            weight_offs = offs
            if weight_ptr is not None:
                if where_ptr is not None:
                    offs_r = tl.load(where_ptr + offs_r, mask=mask_r, other=0).to(tl.int64)
                weight_offs = offs_p[:, None] * stride_weight_p + offs_r[None, :] * stride_weight_r
            adamw_tile(
                part, out_ptr, exp_avg_ptr, exp_avg_sq_ptr, coefficients_ptr, eps,
                base_ptr, weight_ptr, offs, weight_offs, mask_p[:, None] & mask_r[None, :],
                BETA1, BETA2,
            )  # fmt: skip
    else:
        out_ptrs = (
            out_ptr
            + split.to(tl.int64) * stride_split
            + offs_p[:, None] * stride_op
            + offs_r[None, :] * stride_or
        )
        mask = mask_p[:, None] & mask_r[None, :]
        if ACCUMULATE:
            acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit
def _reduce_kernel(
    partial_ptr, out_ptr,
    num_splits, rows, cols,
    stride_or, stride_oc,
    exp_avg_ptr, exp_avg_sq_ptr, coefficients_ptr, eps,
    weight_ptr, base_ptr, where_row_ptr, where_col_ptr, stride_weight_r, stride_weight_c,
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
    row, col = offs // cols, offs % cols
    offs = row * stride_or + col * stride_oc
    if exp_avg_ptr is not None:
        weight_offs = offs
        if weight_ptr is not None:
            if where_row_ptr is not None:
                row = tl.load(where_row_ptr + row, mask=mask, other=0).to(tl.int64)
            if where_col_ptr is not None:
                col = tl.load(where_col_ptr + col, mask=mask, other=0).to(tl.int64)
            weight_offs = row * stride_weight_r + col * stride_weight_c
        adamw_tile(
            acc, out_ptr, exp_avg_ptr, exp_avg_sq_ptr, coefficients_ptr, eps, base_ptr, weight_ptr,
            offs, weight_offs, mask, BETA1, BETA2,
        )  # fmt: skip
    else:
        if ACCUMULATE:
            acc += tl.load(out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def slice_grad(
    dy: Tensor,
    x: Tensor,
    index: Tensor | slice | None,
    dim: str,
    out: Tensor | Update | None = None,
) -> Tensor:
    """dyᵀ x[:, index] (N, R) for dim="in", dy[:, index]ᵀ x (R, K) for dim="out".

    dy (M, N), x (M, K); with index=None the operand that would be gathered is the compact (M, R).
    Returns it in fp32, or adds it into `out`, of any floating dtype, and returns `out`, or uses it
    up in `out`, a step of AdamW, and returns its values.
    """
    update: tuple = NO_UPDATE
    strides: tuple = (None, None)
    betas: tuple = (None, None)
    if isinstance(out, Update):
        update, strides, betas = _unpacked(out)
        out = out.values
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
            wide, part, index, target,
            M, P, R, tokens_per_split,
            *wide.stride(),
            *part.stride(),
            P * R, stride_op, stride_or,
            *(NO_UPDATE if num_splits > 1 else update),
            *(strides if dim == "in" else strides[::-1]),
            ACCUMULATE=accumulate and num_splits == 1,
            BETA1=betas[0],
            BETA2=betas[1],
            **launch,
        )  # fmt: skip
        if num_splits > 1:
            _reduce_kernel[(triton.cdiv(P * R, REDUCE_LAUNCH["BLOCK"]),)](
                target, out,
                num_splits, *shape,
                *out.stride(),
                *update[:-1],
                *((None, update[-1]) if dim == "in" else (update[-1], None)),
                *strides,
                ACCUMULATE=accumulate,
                BETA1=betas[0],
                BETA2=betas[1],
                **REDUCE_LAUNCH,
            )  # fmt: skip
    return out


def _unpacked(update: Update) -> tuple[tuple, tuple, tuple]:
    """(what kernels take in the place of NO_UPDATE, strides of the weight, betas)."""
    weight = base = where = None
    strides: tuple = (None, None)
    if update.slice is not None:
        weight, base, where, dim = update.slice
        strides = weight.stride()
        if isinstance(where, slice):  # a run of channels is a view
            weight, where = weight[:, where] if dim == "in" else weight[where], None
        weight, base = weight.detach(), base.contiguous()
    states = update.exp_avg, update.exp_avg_sq, update.coefficients, update.eps
    return (*states, weight, base, where), strides, update.betas


def _choose_splits(num_tokens: int, tiles: int, programs: int) -> int:
    """So many that tiles x splits is the most that `programs` runs at once, and that each has
    MIN_TOKENS_PER_SPLIT tokens or more.
    """
    return max(1, min(programs // max(tiles, 1), num_tokens // MIN_TOKENS_PER_SPLIT))


def _split(num_tokens: int, splits: int, block: int) -> tuple[int, int]:
    """(splits, tokens of each): a whole number of blocks each, at most `splits`, none empty."""
    tokens = max(block, triton.cdiv(triton.cdiv(num_tokens, splits), block) * block)
    return max(1, triton.cdiv(num_tokens, tokens)), tokens
