"""AdamW in two halves: the moments where a gradient is computed, the values in the step.

    m = β₁ m + (1 - β₁) g        v = β₂ v + (1 - β₂) g²        `update_moments`, on a tile of g
    p = (1 - lr λ) p - lr / (1 - β₁ᵗ) m / (√v / √(1 - β₂ᵗ) + ε)        `adamw_values_`

g is in registers when its moments are updated, and is written nowhere. The step is elementwise on
the flat buffers of an optimizer, n numbers: 12 n bytes read and 4 n written, in fp32.
"""

import triton
import triton.language as tl
from torch import Tensor

from s2kernels.kernels.target import on_device

LAUNCH = dict(BLOCK=1024, num_warps=4)


@triton.jit
def update_moments(
    grad, exp_avg_ptrs, exp_avg_sq_ptrs, mask, BETA1: tl.constexpr, BETA2: tl.constexpr
):
    """m and v at those addresses, of the fp32 gradients of a tile."""
    # One after the other: a tile of each at a time is in registers beside the gradients.
    exp_avg_sq = tl.load(exp_avg_sq_ptrs, mask=mask, other=0.0).to(tl.float32)
    exp_avg_sq = exp_avg_sq * BETA2 + grad * grad * (1 - BETA2)
    tl.store(exp_avg_sq_ptrs, exp_avg_sq.to(exp_avg_sq_ptrs.dtype.element_ty), mask=mask)
    exp_avg = tl.load(exp_avg_ptrs, mask=mask, other=0.0).to(tl.float32)
    exp_avg = exp_avg * BETA1 + grad * (1 - BETA1)
    tl.store(exp_avg_ptrs, exp_avg.to(exp_avg_ptrs.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit
def _adamw_values_kernel(
    values_ptr, exp_avg_ptr, exp_avg_sq_ptr, coefficients_ptr,
    num, eps,
    BLOCK: tl.constexpr,
):
    # fmt: on
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num
    decay = tl.load(coefficients_ptr)
    step_size = tl.load(coefficients_ptr + 1)
    correction = tl.load(coefficients_ptr + 2)
    values = tl.load(values_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    size = tl.sqrt_rn(exp_avg_sq) * correction + eps
    values = values * decay - step_size * tl.div_rn(exp_avg, size)
    tl.store(values_ptr + offs, values.to(values_ptr.dtype.element_ty), mask=mask)


def adamw_values_(
    values: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, coefficients: Tensor, eps: float
) -> None:
    """values (n,), in place, of moments (n,), contiguous, and coefficients (3,), fp32:
    1 - lr λ, lr / (1 - β₁ᵗ), 1 / √(1 - β₂ᵗ).
    """
    num = values.shape[0]
    with on_device(values):
        _adamw_values_kernel[(triton.cdiv(num, LAUNCH["BLOCK"]),)](
            values, exp_avg, exp_avg_sq, coefficients,
            num, eps,
            **LAUNCH,
        )  # fmt: skip
