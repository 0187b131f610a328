"""AdamW where a gradient is computed: on a tile of it, which is written nowhere.

    m = β₁ m + (1 - β₁) g        v = β₂ v + (1 - β₂) g²
    p = (1 - lr λ) p - lr / (1 - β₁ᵗ) m / (√v / √(1 - β₂ᵗ) + ε)
    W[slice] = W0[slice] + p, rounded once

For each entry, with p, m and v in fp32 and W in bf16, 12 bytes are read, 2 of W0, and 14 written.
"""

import triton
import triton.language as tl


# fmt: off
@triton.jit
def adamw_tile(
    grad, values_ptr, exp_avg_ptr, exp_avg_sq_ptr, coefficients_ptr, eps, base_ptr, weight_ptr,
    offs, weight_offs, mask, BETA1: tl.constexpr, BETA2: tl.constexpr,
):
    # fmt: on
    """One step of the entries at `offs` of p, m, v and W0, which are at `weight_offs` in W.

    grad: their gradients, fp32. weight_ptr is None where nothing is written into a weight.
    """
    # One after the other: as few tiles as possible are in registers beside the gradients. Values
    # are loaded before the quotient: behind it two launches spilled 8 bytes of a thread.
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    exp_avg_sq = exp_avg_sq * BETA2 + grad * grad * (1 - BETA2)
    tl.store(exp_avg_sq_ptr + offs, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
    size = tl.sqrt_rn(exp_avg_sq) * tl.load(coefficients_ptr + 2) + eps
    exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    exp_avg = exp_avg * BETA1 + grad * (1 - BETA1)
    tl.store(exp_avg_ptr + offs, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=mask)
    values = tl.load(values_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    change = tl.load(coefficients_ptr + 1) * tl.div_rn(exp_avg, size)
    values = values * tl.load(coefficients_ptr) - change
    tl.store(values_ptr + offs, values.to(values_ptr.dtype.element_ty), mask=mask)
    if weight_ptr is not None:
        base = tl.load(base_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        total = (base + values).to(weight_ptr.dtype.element_ty)
        tl.store(weight_ptr + weight_offs, total, mask=mask)
