"""torch.autograd.Functions over the ops of s2kernels, and the functions that call them."""

from s2kernels.autograd.linear import S2DeltaFunction, S2LinearFunction, s2_delta, s2_linear
from s2kernels.autograd.mlp import S2MLPFunction, s2_mlp
from s2kernels.autograd.panels import Panels
from s2kernels.autograd.sparse import SparseLinearFunction, sparse_linear
from s2kernels.autograd.swiglu import SwiGLUFunction, silu_mul

__all__ = [
    "Panels",
    "S2DeltaFunction",
    "S2LinearFunction",
    "S2MLPFunction",
    "SparseLinearFunction",
    "SwiGLUFunction",
    "s2_delta",
    "s2_linear",
    "s2_mlp",
    "silu_mul",
    "sparse_linear",
]
