"""The slice's part of a linear layer, added to what the base layer computed (additive mode).

    slice_linear_     dim="in":   y           += x[:, index] deltaᵀ     delta (N, R)
                      dim="out":  y[:, index] += x deltaᵀ               delta (R, K)
    slice_linear_dx_  dim="in":   dx[:, index] += dy delta
                      dim="out":  dx           += dy[:, index] delta

x, dx (M, K); y, dy (M, N): M tokens, N out_features, K in_features, R trained channels. Two of the
four gather the columns of the first operand, two scatter into the columns of the result. One
kernel, c[:, columns] += a[:, channels] b for b (D, C), serves them all: at most one of the two sets
is an index, the other is everything. The sum is in fp32 and rounded once, to c's dtype.
"""

import triton
import triton.language as tl
from torch import Tensor

from s2kernels.kernels.target import launch_parameters, on_device
from s2kernels.kernels.tiles import fitted_block, grouped_tile

# BLOCK_C is the largest one; fitted_block takes a smaller one for fewer columns.
GATHER_LAUNCH = {
    "half": dict(BLOCK_M=128, BLOCK_C=128, BLOCK_D=32, GROUP_M=8, num_warps=8, num_stages=3),
    "float32": dict(BLOCK_M=64, BLOCK_C=64, BLOCK_D=16, GROUP_M=8, num_warps=8, num_stages=2),
}
# Narrower: the addresses of the columns of a scatter take registers beside the sums.
SCATTER_LAUNCH = {
    "half": dict(BLOCK_M=128, BLOCK_C=64, BLOCK_D=32, GROUP_M=8, num_warps=8, num_stages=3),
    "float32": dict(BLOCK_M=64, BLOCK_C=32, BLOCK_D=16, GROUP_M=8, num_warps=8, num_stages=2),
}


# fmt: off
@triton.jit
def _slice_linear_kernel(
    a_ptr, b_ptr, c_ptr, gather_ptr, scatter_ptr,
    M, C, D,
    stride_am, stride_ad,
    stride_bd, stride_bc,
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
        mask_d = offs_d < D
        channels = offs_d
        if gather_ptr is not None:
            channels = tl.load(gather_ptr + offs_d, mask=mask_d, other=0).to(tl.int64)
        a = tl.load(  # (BLOCK_M, BLOCK_D)
            a_ptr + offs_m[:, None] * stride_am + channels[None, :] * stride_ad,
            mask=mask_m & mask_d[None, :],
            other=0.0,
        )
        b = tl.load(  # (BLOCK_D, BLOCK_C)
            b_ptr + offs_d[:, None] * stride_bd + offs_c[None, :] * stride_bc,
            mask=mask_d[:, None] & mask_c,
            other=0.0,
        )
        # The small fp32 delta takes the dtype of the activations, tile by tile: no copy of it.
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")

    columns = offs_c
    if scatter_ptr is not None:
        columns = tl.load(scatter_ptr + offs_c, mask=offs_c < C, other=0).to(tl.int64)
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + columns[None, :] * stride_cc
    mask = mask_m & mask_c
    acc += tl.load(c_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask)


def slice_linear_(
    y: Tensor, x: Tensor, delta: Tensor, index: Tensor | slice | None, dim: str
) -> Tensor:
    """y += x[:, index] deltaᵀ for dim="in", y[:, index] += x deltaᵀ for dim="out"; returns y.

    y (M, N), x (M, K), delta (N, R) or (R, K); for dim="in" with index=None, x is the compact
    slice (M, R).
    """
    if dim == "in":
        _add_gathered(y, x, delta.t(), index)
    else:
        assert index is not None
        _add_scattered(y, x, delta.t(), index)
    return y


def slice_linear_dx_(
    dx: Tensor, dy: Tensor, delta: Tensor, index: Tensor | slice, dim: str
) -> Tensor:
    """dx[:, index] += dy delta for dim="in", dx += dy[:, index] delta for dim="out"; returns dx.

    dx (M, K), dy (M, N), delta (N, R) or (R, K).
    """
    if dim == "out":
        _add_gathered(dx, dy, delta, index)
    else:
        _add_scattered(dx, dy, delta, index)
    return dx


def _add_gathered(c: Tensor, a: Tensor, b: Tensor, index: Tensor | slice | None) -> None:
    """c += a[:, index] b."""
    if isinstance(index, slice):
        a, index = a[:, index], None  # a run of channels is a view
    _launch(GATHER_LAUNCH, c, a, b, gather=index, scatter=None)


def _add_scattered(c: Tensor, a: Tensor, b: Tensor, index: Tensor | slice) -> None:
    """c[:, index] += a b."""
    if isinstance(index, slice):
        _launch(SCATTER_LAUNCH, c[:, index], a, b, gather=None, scatter=None)
    else:
        _launch(SCATTER_LAUNCH, c, a, b, gather=None, scatter=index)


def _launch(
    table: dict[str, dict[str, int]],
    c: Tensor,
    a: Tensor,
    b: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
) -> None:
    M, (D, C) = a.shape[0], b.shape
    launch = dict(launch_parameters(table, a.dtype))
    launch["BLOCK_C"] = fitted_block(C, launch["BLOCK_C"])
    grid = (triton.cdiv(M, launch["BLOCK_M"]) * triton.cdiv(C, launch["BLOCK_C"]),)
    with on_device(a):
        _slice_linear_kernel[grid](
            a, b, c, gather, scatter,
            M, C, D,
            *a.stride(),
            *b.stride(),
            *c.stride(),
            **launch,
        )  # fmt: skip
