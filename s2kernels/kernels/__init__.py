"""The ops of `s2kernels.reference`, same names and signatures, as Triton kernels.

They take float32, float16 and bfloat16, every size from 0 up, and any strides.
"""

from s2kernels.kernels.linear import linear, linear_dx
from s2kernels.kernels.slice_grad import slice_grad
from s2kernels.kernels.slice_linear import slice_linear_, slice_linear_dx_
from s2kernels.kernels.slice_write import slice_write
from s2kernels.kernels.swiglu import swiglu, swiglu_bwd

__all__ = [
    "linear",
    "linear_dx",
    "slice_grad",
    "slice_linear_",
    "slice_linear_dx_",
    "slice_write",
    "swiglu",
    "swiglu_bwd",
]
