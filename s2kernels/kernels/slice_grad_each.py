"""Gradients of the slices of all experts of a mixture, in one launch.

    dim="in":   d_delta_e = dy_eᵀ x_e[:, index_e]    (E, N, R)
    dim="out":  d_delta_e = dy_e[:, index_e]ᵀ x_e    (E, R, K)

S pairs of a token and an expert, sorted by expert; subscript e: those of expert e, of which
`offsets` says on the device where they end. N out_features, K in_features, R trained channels. For
each expert it is the product of slice_grad, wideᵀ slice of a wide operand (S, P) and a slice
operand (S, R), and both orientations are one kernel.

A program makes one tile of one expert over all of the expert's pairs, and adds it to what is there:
no partial sums and no atomics, equal inputs give bit-equal gradients. The tiles of one expert are
neighbours, so that they find its pairs in L2. There are E times the tiles of slice_grad, which is
enough for a GPU without a split over pairs; but the tiles of an expert that has most of the pairs
walk them one block after another, while the multiprocessors of the others idle.

Limit: the bytes of the wide operand, S P elements read once (R up to 128), and of the gradients,
E P R read and written; 2 S P R FLOPs above some 200 channels.
"""

import triton
import triton.language as tl
from torch import Tensor

from s2kernels.kernels.target import launch_parameters, on_device
from s2kernels.kernels.tiles import fitted_block, grouped_tile

# BLOCK_R is the largest one; fitted_block takes a smaller one for a smaller slice.
LAUNCH = {
    "half": dict(BLOCK_S=64, BLOCK_P=128, BLOCK_R=128, GROUP_P=8, num_warps=8, num_stages=3),
    "float32": dict(BLOCK_S=16, BLOCK_P=64, BLOCK_R=64, GROUP_P=8, num_warps=8, num_stages=2),
}
# For slices of at most NARROW channels.
NARROW = 32
NARROW_LAUNCH = {
    "half": dict(BLOCK_S=64, BLOCK_P=128, BLOCK_R=32, GROUP_P=8, num_warps=4, num_stages=3),
    "float32": dict(BLOCK_S=16, BLOCK_P=64, BLOCK_R=32, GROUP_P=8, num_warps=4, num_stages=2),
}


# fmt: off
@triton.jit
def _slice_grad_each_kernel(
    wide_ptr, slice_ptr, offsets_ptr, index_ptr, out_ptr,
    P, R,
    stride_ws, stride_wp,
    stride_ss, stride_sr,
    stride_oe, stride_op, stride_or,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_P: tl.constexpr,
):
    # fmt: on
    pid_p, pid_r = grouped_tile(
        tl.program_id(0), tl.cdiv(P, BLOCK_P), tl.cdiv(R, BLOCK_R), GROUP_P
    )
    expert = tl.program_id(1).to(tl.int64)
    first = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    if first < end:
        offs_p = pid_p.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        offs_r = pid_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_p, mask_r = offs_p < P, offs_r < R
        channels = offs_r
        if index_ptr is not None:
            channels = tl.load(index_ptr + expert * R + offs_r, mask=mask_r, other=0).to(tl.int64)

        # The last block may be short: both operands are zero where the next expert's pairs begin.
        acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
        for start in range(first, end, BLOCK_S):
            offs_s = start + tl.arange(0, BLOCK_S).to(tl.int64)
            mask_s = offs_s[:, None] < end
            wide = tl.load(  # (BLOCK_S, BLOCK_P)
                wide_ptr + offs_s[:, None] * stride_ws + offs_p[None, :] * stride_wp,
                mask=mask_s & mask_p[None, :],
                other=0.0,
            )
            part = tl.load(  # (BLOCK_S, BLOCK_R)
                slice_ptr + offs_s[:, None] * stride_ss + channels[None, :] * stride_sr,
                mask=mask_s & mask_r[None, :],
                other=0.0,
            )
            acc = tl.dot(tl.trans(wide), part, acc, input_precision="ieee")

        out_ptrs = (
            out_ptr
            + expert * stride_oe
            + offs_p[:, None] * stride_op
            + offs_r[None, :] * stride_or
        )
        mask = mask_p[:, None] & mask_r[None, :]
        acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def slice_grad_each(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    index: Tensor | slice | None,
    dim: str,
    out: Tensor,
) -> Tensor:
    """Adds dy_eᵀ x_e[:, index_e] (N, R) for dim="in", dy_e[:, index_e]ᵀ x_e (R, K) for dim="out"
    into out[e], for each expert e that has pairs, and returns out.

    dy (S, N), x (S, K), pairs sorted by expert; offsets int32 (E,), where those of each expert end.
    index int32 (E, R), contiguous, or a slice that is the same in all experts; with index=None the
    operand that would be gathered is the compact (S, R). out (E, N, R) or (E, R, K), of any
    floating dtype.
    """
    wide, part = (dy, x) if dim == "in" else (x, dy)
    if isinstance(index, slice):
        part, index = part[:, index], None  # a run of channels is a view
    P, R = wide.shape[1], part.shape[1] if index is None else index.shape[1]
    table = NARROW_LAUNCH if R <= NARROW else LAUNCH
    launch = dict(launch_parameters(table, wide.dtype))
    launch["BLOCK_R"] = fitted_block(R, launch["BLOCK_R"])
    stride_oe, *strides = out.stride()
    stride_op, stride_or = strides if dim == "in" else reversed(strides)
    tiles = triton.cdiv(P, launch["BLOCK_P"]) * triton.cdiv(R, launch["BLOCK_R"])

    with on_device(wide):
        _slice_grad_each_kernel[(tiles, len(offsets))](
            wide, part, offsets, index, out,
            P, R,
            *wide.stride(),
            *part.stride(),
            stride_oe, stride_op, stride_or,
            **launch,
        )  # fmt: skip
    return out
