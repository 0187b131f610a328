"""The ops of `s2kernels.reference`, same names and signatures, as Triton kernels.

They take float32, float16 and bfloat16, every size from 0 up, and any strides.
"""

from s2kernels.kernels.fused_linear import (
    linear_dx_plus_slice,
    linear_dx_swiglu_bwd,
    linear_plus_slice,
)
from s2kernels.kernels.grouped import grouped_in_, grouped_out_
from s2kernels.kernels.linear import linear, linear_dx
from s2kernels.kernels.slice_grad import slice_grad
from s2kernels.kernels.slice_grad_each import slice_grad_each
from s2kernels.kernels.slice_linear import slice_linear_, slice_linear_dx_
from s2kernels.kernels.slice_write import slice_write, slice_writer
from s2kernels.kernels.sm3 import sm3_update
from s2kernels.kernels.sparse_grad import sparse_grad
from s2kernels.kernels.sparse_growth import growth_candidates, sm3_growth
from s2kernels.kernels.sparse_write import sparse_write
from s2kernels.kernels.swiglu import swiglu, swiglu_bwd
from s2kernels.plan import tile_plan

__all__ = [
    "grouped_in_",
    "grouped_out_",
    "growth_candidates",
    "linear",
    "linear_dx",
    "linear_dx_plus_slice",
    "linear_dx_swiglu_bwd",
    "linear_plus_slice",
    "slice_grad",
    "slice_grad_each",
    "slice_linear_",
    "slice_linear_dx_",
    "slice_write",
    "slice_writer",
    "sm3_growth",
    "sm3_update",
    "sparse_grad",
    "sparse_write",
    "swiglu",
    "swiglu_bwd",
    "tile_plan",
]
