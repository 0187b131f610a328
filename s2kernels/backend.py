"""The one place that decides whether an op runs in Triton or in plain torch."""

from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from s2kernels import reference


def select(x: Tensor, impl: str | None = None) -> ModuleType | SimpleNamespace:
    """The ops for tensors like x, as a namespace with the names of `s2kernels.reference`.

    impl=None: on CUDA the Triton kernels, but cuBLAS (through torch) for the two dense GEMMs, where
    it is the faster one until a measurement says otherwise; plain torch on every other device, and
    for fp64, which the kernels do not have. Under torch.compile slice_write is torch's, too: that
    of the kernels needs addresses, which a traced graph does not have.
    impl="triton" or "torch": all ops from that one, whatever the device. It never falls back.

    Raises ValueError for any other impl.
    """
    if impl == "torch" or (impl is None and (not x.is_cuda or x.element_size() == 8)):
        return reference
    if impl not in (None, "triton"):
        raise ValueError(f"impl must be None, 'triton' or 'torch', got {impl!r}")

    from s2kernels import kernels

    if impl == "triton":
        return kernels
    return SimpleNamespace(
        linear=reference.linear,
        linear_dx=reference.linear_dx,
        slice_grad=kernels.slice_grad,
        swiglu=kernels.swiglu,
        swiglu_bwd=kernels.swiglu_bwd,
        slice_write=(reference if torch.compiler.is_compiling() else kernels).slice_write,
        slice_linear_=kernels.slice_linear_,
        slice_linear_dx_=kernels.slice_linear_dx_,
    )
