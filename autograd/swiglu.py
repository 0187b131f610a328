"""h = silu(gate) * up of an FFN whose three matrices are called one by one.

    dgate = dh * up * s * (1 + gate * (1 - s))        dup = dh * gate * s        s = sigmoid(gate)

It saves gate and up, which the products before it made, and nothing else; torch's own operations
save silu(gate), too, and make two passes more over memory.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2kernels import backend


def silu_mul(gate: Tensor, up: Tensor, impl: str | None = None) -> Tensor:
    """silu(gate) * up for two tensors of one shape (..., K), dtype and device, as a new tensor.

    impl: "triton", "torch", or None to let `s2kernels.backend` decide. Gradients: gate, up.

    Raises ValueError for tensors that differ in shape, dtype or device.
    """
    kinds = [(tuple(x.shape), x.dtype, x.device) for x in (gate, up)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"up must have the shape, dtype and device of gate, got {kinds}")
    size = gate.shape[-1]
    h = SwiGLUFunction.apply(gate.reshape(-1, size), up.reshape(-1, size), impl)
    return h.view(gate.shape)


class SwiGLUFunction(torch.autograd.Function):
    """h (M, K) of gate and up (M, K)."""

    @staticmethod
    def forward(ctx, gate, up, impl):
        ctx.save_for_backward(gate, up)
        ctx.impl = impl
        return backend.select(gate, impl).swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        dgate, dup, _ = backend.select(gate, ctx.impl).swiglu_bwd(dh, gate, up)
        return dgate, dup, None
