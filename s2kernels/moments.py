"""The moments of AdamW as the place where a gradient goes: it is used up, and kept nowhere.

    m = β₁ m + (1 - β₁) g        v = β₂ v + (1 - β₂) g²        (Adam, algorithm 1)

`slice_grad` takes one of these as its `out`. The values follow in the optimizer's step, from m and
v alone (`adamw_values_`).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """m and v of one parameter, in its shape and dtype, contiguous; betas (β₁, β₂)."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    betas: tuple[float, float]

    def check(self, dy: Tensor) -> None:
        """Raises TypeError for a gradient of fp16, which somebody scaled and nobody can unscale."""
        if dy.dtype == torch.float16:
            raise TypeError(
                "moments_in_backward must not train in float16, whose gradients need a GradScaler: "
                "use bfloat16"
            )
