"""Dense linear layer with a frozen weight: output and gradient of the input.

    linear:     y  = x Wᵀ + b     x (M, K), W (N, K), b (N,)  ->  y (M, N)
    linear_dx:  dx = dy W         dy (M, N), W (N, K)         ->  dx (M, K)

M tokens, N out_features, K in_features. Both are one product, c = a b + bias for a (M, D), b (D, C)
with C columns and D the contracted dimension: Wᵀ and W differ by their strides alone.

Two kernels compute it. Where the chip has a tensor copy engine and the matrices suit it, a
persistent one moves tiles by descriptors; one with plain pointers serves every other chip, dtype
and stride.

Limit: 2 M N K FLOPs at the rate of the tensor cores. The bytes, 2 (M K + N K + M N), take less time
than that from some 200 tokens on.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from s2kernels.kernels.target import (
    chip,
    launch_parameters,
    num_sms,
    on_device,
    takes_descriptors,
    tuned_parameters,
)
from s2kernels.kernels.tiles import column_halves, grouped_tile

LAUNCH = {
    "half": dict(BLOCK_M=128, BLOCK_C=128, BLOCK_D=64, GROUP_M=8, num_warps=8, num_stages=3),
    "float32": dict(BLOCK_M=64, BLOCK_C=64, BLOCK_D=16, GROUP_M=8, num_warps=8, num_stages=2),
}
# By chip. Stages of 48 KB, and the room for half a tile on its way out, fill the shared memory.
# PROGRAMS: of one multiprocessor at a time.
_TILE = dict(BLOCK_M=128, BLOCK_C=256, BLOCK_D=64, GROUP_M=8, HALVES=True, PROGRAMS=1)
DESCRIPTOR_LAUNCH = {
    "sm_90": dict(_TILE, num_warps=8, num_stages=4),
    "sm_100": dict(_TILE, num_warps=8, num_stages=3),
}


# fmt: off
@triton.jit
def _linear_kernel(
    a_ptr, b_ptr, bias_ptr, c_ptr,
    M, C, D,
    stride_am, stride_ad,
    stride_bd, stride_bc,
    stride_bias,
    stride_cm, stride_cc,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr,
):
    # fmt: on
    pid_m, pid_c = grouped_tile(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_C), GROUP_M
    )
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m[:, None] < M, offs_c[None, :] < C

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        a = tl.load(  # (BLOCK_M, BLOCK_D)
            a_ptr + offs_m[:, None] * stride_am + offs_d[None, :] * stride_ad,
            mask=mask_m & (offs_d[None, :] < D),
            other=0.0,
        )
        b = tl.load(  # (BLOCK_D, BLOCK_C)
            b_ptr + offs_d[:, None] * stride_bd + offs_c[None, :] * stride_bc,
            mask=(offs_d[:, None] < D) & mask_c,
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision="ieee")

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c * stride_bias, mask=offs_c < C, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_c[None, :] * stride_cc
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask_m & mask_c)


# fmt: off
@triton.jit
def _linear_descriptor_kernel(
    a_desc, b_desc, bias_ptr, a_slice_desc, b_slice_desc, c_desc,
    M, C, D, R,
    stride_bias,
    B_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
):
    # fmt: on
    # Descriptors read zeros past the end and write nothing there: no masks. Their coordinates are
    # 32 bits, of rows and columns, not of elements. Flattened, the loop over tiles loads the first
    # operands of the next tile while it stores this one.
    tiles_m, tiles_c = tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_C)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_c, tl.num_programs(0), flatten=True):
        pid_m, pid_c = grouped_tile(tile, tiles_m, tiles_c, GROUP_M)
        first_m, first_c = pid_m * BLOCK_M, pid_c * BLOCK_C
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for start in range(0, D, BLOCK_D):
            acc = dot_tiles(a_desc, b_desc, first_m, first_c, start, acc, B_TRANSPOSED)
        if a_slice_desc is not None:
            for start in range(0, R, BLOCK_D):
                acc = dot_tiles(
                    a_slice_desc, b_slice_desc, first_m, first_c, start, acc, B_TRANSPOSED
                )

        if bias_ptr is not None:
            offs_c = first_c.to(tl.int64) + tl.arange(0, BLOCK_C)
            bias = tl.load(bias_ptr + offs_c * stride_bias, mask=offs_c < C, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        c = acc.to(c_desc.dtype)
        if HALVES:
            left, right = column_halves(c)
            c_desc.store([first_m, first_c], left)
            c_desc.store([first_m, first_c + BLOCK_C // 2], right)
        else:
            c_desc.store([first_m, first_c], c)


@triton.jit
def dot_tiles(a_desc, b_desc, first_m, first_c, start, acc, B_TRANSPOSED: tl.constexpr):
    """acc + a b of the tiles that begin at `start` of the contracted dimension."""
    a = a_desc.load([first_m, start])  # (BLOCK_M, BLOCK_D)
    if B_TRANSPOSED:
        b = b_desc.load([first_c, start]).T  # (BLOCK_D, BLOCK_C)
    else:
        b = b_desc.load([start, first_c])
    return tl.dot(a, b, acc)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b for x (..., K), weight (N, K), bias (N,); y (..., N) in x.dtype."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, out = (matrix.reshape(-1, matrix.shape[-1]) for matrix in (x, y))
    if takes_descriptors(rows, weight, out):
        launch_descriptors("linear", rows, weight, bias, out, transposed=True)
    else:
        _launch_pointers(rows, weight.t(), bias, out)
    return y


def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """dx = dy W for dy (M, N), weight (N, K); dx (M, K) in dy.dtype."""
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    if takes_descriptors(dy, weight, dx):
        launch_descriptors("linear_dx", dy, weight, None, dx, transposed=False)
    else:
        _launch_pointers(dy, weight, None, dx)
    return dx


def _launch_pointers(a: Tensor, b: Tensor, bias: Tensor | None, c: Tensor) -> None:
    """c = a b + bias for a (M, D), b (D, C), bias (C,), c (M, C)."""
    (M, D), C = a.shape, b.shape[1]
    launch = launch_parameters(LAUNCH, a.dtype)
    grid = (triton.cdiv(M, launch["BLOCK_M"]) * triton.cdiv(C, launch["BLOCK_C"]),)
    with on_device(a):
        _linear_kernel[grid](
            a, b, bias, c,
            M, C, D,
            *a.stride(),
            *b.stride(),
            0 if bias is None else bias.stride(0),
            *c.stride(),
            **launch,
        )  # fmt: skip


def launch_descriptors(
    op: str,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    c: Tensor,
    transposed: bool,
    part: tuple[Tensor, Tensor] | None = None,
) -> None:
    """c = a b + bias, and with a part (a2, b2) + a2 b2; b and b2 are (C, D) where transposed."""
    (M, D), C = a.shape, c.shape[1]
    default = DESCRIPTOR_LAUNCH[chip(a.device).arch]
    launch = dict(tuned_parameters(op, a, tuple(b.shape), M, default))
    block_m, block_c, block_d = (launch[f"BLOCK_{dim}"] for dim in "MCD")
    blocks_a, blocks_b = [block_m, block_d], [block_d, block_c]
    if transposed:
        blocks_b.reverse()
    descriptor = TensorDescriptor.from_tensor
    part_descriptors = (None, None)
    if part is not None:
        part_descriptors = descriptor(part[0], blocks_a), descriptor(part[1], blocks_b)
    tiles = triton.cdiv(M, block_m) * triton.cdiv(C, block_c)
    programs = launch.pop("PROGRAMS") * num_sms(a.device)
    with on_device(a):
        _linear_descriptor_kernel[(min(tiles, programs),)](
            descriptor(a, blocks_a),
            descriptor(b, blocks_b),
            bias,
            *part_descriptors,
            descriptor(c, [block_m, block_c // 2 if launch["HALVES"] else block_c]),
            M, C, D, 0 if part is None else part[0].shape[1],
            0 if bias is None else bias.stride(0),
            B_TRANSPOSED=transposed,
            **launch,
        )  # fmt: skip
