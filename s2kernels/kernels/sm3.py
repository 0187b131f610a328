"""The row and column statistics of SM3 for scattered entries of a weight.

    nu[e]  = min(row[row_e], col[col_e]) + grad[e]²
    row[n] = max(row[n], nu[e] of the entries in row n)      col[c] likewise

row (N,), col (K,), fp32 and never negative; k entries at flat positions row * K + col. One launch
computes nu from the statistics before the step, a second one raises them. A maximum does not
depend on the order in which it is taken: its atomics give equal results for equal inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2kernels.kernels.target import on_device

LAUNCH = dict(BLOCK=1024, num_warps=4)


# fmt: off
@triton.jit
def _sm3_nu_kernel(
    row_ptr, col_ptr, index_ptr, grad_ptr, nu_ptr,
    num, K,
    stride_row, stride_col, stride_grad,
    BLOCK: tl.constexpr,
):
    # fmt: on
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num
    position = tl.load(index_ptr + offs, mask=mask, other=0).to(tl.int64)
    row = tl.load(row_ptr + (position // K) * stride_row, mask=mask, other=0.0)
    col = tl.load(col_ptr + (position % K) * stride_col, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + offs * stride_grad, mask=mask, other=0.0).to(tl.float32)
    least = tl.minimum(row, col, propagate_nan=tl.PropagateNan.ALL)
    tl.store(nu_ptr + offs, least + grad * grad, mask=mask)


# fmt: off
@triton.jit
def _sm3_raise_kernel(
    row_ptr, col_ptr, index_ptr, nu_ptr,
    num, K,
    stride_row, stride_col,
    BLOCK: tl.constexpr,
):
    # fmt: on
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num
    position = tl.load(index_ptr + offs, mask=mask, other=0).to(tl.int64)
    # The bits of numbers that are not negative are integers in the same order, NaN above them all.
    nu = tl.load(nu_ptr + offs, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    row_ptr = row_ptr.to(tl.pointer_type(tl.int32))
    col_ptr = col_ptr.to(tl.pointer_type(tl.int32))
    tl.atomic_max(row_ptr + (position // K) * stride_row, nu, mask=mask, sem="relaxed")
    tl.atomic_max(col_ptr + (position % K) * stride_col, nu, mask=mask, sem="relaxed")


def sm3_update(row: Tensor, col: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """nu (k,) fp32 for grad (k,); raises row (N,) and col (K,), fp32, in place."""
    num, K = index.shape[0], col.shape[0]
    nu = torch.empty(num, dtype=torch.float32, device=row.device)
    grid = (triton.cdiv(num, LAUNCH["BLOCK"]),)
    with on_device(row):
        _sm3_nu_kernel[grid](
            row, col, index, grad, nu,
            num, K,
            *row.stride(), *col.stride(), *grad.stride(),
            **LAUNCH,
        )  # fmt: skip
        _sm3_raise_kernel[grid](
            row, col, index, nu,
            num, K,
            *row.stride(), *col.stride(),
            **LAUNCH,
        )  # fmt: skip
    return nu
