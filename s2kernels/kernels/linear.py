"""Dense linear layer with a frozen weight: output and gradient of the input.

    linear:     y  = x Wᵀ + b     x (M, K), W (N, K), b (N,)  ->  y (M, N)
    linear_dx:  dx = dy W         dy (M, N), W (N, K)         ->  dx (M, K)

M tokens, N out_features, K in_features. Both are one kernel, c = a b + bias for a (M, D), b (D, C)
with C columns and D the contracted dimension: Wᵀ and W differ by their strides alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2kernels.kernels.target import launch_parameters, on_device
from s2kernels.kernels.tiles import grouped_tile

LAUNCH = {
    "half": dict(BLOCK_M=128, BLOCK_C=128, BLOCK_D=64, GROUP_M=8, num_warps=8, num_stages=3),
    "float32": dict(BLOCK_M=64, BLOCK_C=64, BLOCK_D=16, GROUP_M=8, num_warps=8, num_stages=2),
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b for x (M, K), weight (N, K), bias (N,); y (M, N) in x.dtype."""
    return _matmul(x, weight.t(), bias)


def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """dx = dy W for dy (M, N), weight (N, K); dx (M, K) in dy.dtype."""
    return _matmul(dy, weight, None)


def _matmul(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b + bias for a (M, D), b (D, C), bias (C,)."""
    (M, D), C = a.shape, b.shape[1]
    launch = launch_parameters(LAUNCH, a.dtype)
    c = torch.empty((M, C), dtype=a.dtype, device=a.device)
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
    return c
