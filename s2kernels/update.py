"""A step of AdamW as the place where a gradient goes: it is used up, and kept nowhere.

    m = β₁ m + (1 - β₁) g        v = β₂ v + (1 - β₂) g²                        (AdamW, algorithm 2)
    p = (1 - lr λ) p - lr / (1 - β₁ᵗ) m / (√v / √(1 - β₂ᵗ) + ε)
    W[slice] = W0[slice] + p

`slice_grad` takes an `Update` as its `out`. Nothing may read what p and the slice were afterwards:
whoever calls it has computed dx before.
"""

from typing import NamedTuple

from torch import Tensor


class WeightSlice(NamedTuple):
    """Where the sum of a base and a delta belongs.

    weight (N, K); base, what it held at `where` without the delta: (N, R) for dim="in", (R, K) for
    dim="out", in its dtype; where: int32 (R,), or a slice.
    """

    weight: Tensor
    base: Tensor
    where: Tensor | slice
    dim: str


class Update(NamedTuple):
    """One parameter, a delta p, and what its step needs.

    values, exp_avg, exp_avg_sq   p, m and v: of one shape and dtype, contiguous
    coefficients   (3,), 1 - lr λ, lr / (1 - β₁ᵗ) and 1 / √(1 - β₂ᵗ), in fp32, or fp64 for fp64 p
    betas, eps     (β₁, β₂), ε
    slice          where base + p is written; None where p is added to outputs (mode="additive"), or
                   where the caller writes it
    """

    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    coefficients: Tensor
    betas: tuple[float, float]
    eps: float
    slice: WeightSlice | None = None
