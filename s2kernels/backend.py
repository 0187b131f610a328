"""The one place that decides whether an op runs in Triton or in plain torch."""

from functools import cache
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from s2kernels import reference


def select(x: Tensor, impl: str | None = None) -> ModuleType | SimpleNamespace:
    """The ops for tensors like x, as a namespace with the names of `s2kernels.reference`.

    impl=None: on CUDA the Triton kernels, but cuBLAS (through torch) for the two dense GEMMs, save
    where Triton was measured to be faster on this device at this shape (`kernels.tuned.FASTER`);
    plain torch on every other device, and for fp64, which the kernels do not have. Under
    torch.compile slice_write and sparse_write are torch's, too: those of the kernels need
    addresses, which a traced graph does not have.
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
    return _mixed(reference) if torch.compiler.is_compiling() else _eager()


@cache  # it is asked for several times a layer
def _eager() -> SimpleNamespace:
    from s2kernels import kernels

    return _mixed(kernels)


def _mixed(writing: ModuleType) -> SimpleNamespace:
    """The kernels, but torch's dense GEMMs where faster; the ops that write are of `writing`."""
    from s2kernels import kernels

    return SimpleNamespace(
        linear=_linear,
        linear_dx=_linear_dx,
        linear_plus_slice=_linear_plus_slice,
        linear_dx_plus_slice=_linear_dx_plus_slice,
        linear_dx_swiglu_bwd=_linear_dx_swiglu_bwd,
        slice_grad=kernels.slice_grad,
        slice_grad_each=kernels.slice_grad_each,
        swiglu=kernels.swiglu,
        swiglu_bwd=kernels.swiglu_bwd,
        slice_write=writing.slice_write,
        slice_writer=writing.slice_writer,
        slice_linear_=kernels.slice_linear_,
        slice_linear_dx_=kernels.slice_linear_dx_,
        grouped_in_=kernels.grouped_in_,
        grouped_out_=kernels.grouped_out_,
        sparse_write=writing.sparse_write,
        tile_plan=kernels.tile_plan,
        sparse_grad=kernels.sparse_grad,
        growth_candidates=kernels.growth_candidates,
        sm3_update=kernels.sm3_update,
        sm3_growth=kernels.sm3_growth,
    )


def prefers_joined(weight: Tensor) -> bool:
    """Whether one GEMM with two weights, one after the other, beats two GEMMs.

    On a GPU it is a launch less and leaves fewer multiprocessors idle at the end. On a CPU it took
    longer than two, at 128 tokens and 1024 to 2048 channels in MKL.
    """
    return weight.is_cuda


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _faster("linear", x, weight).linear(x, weight, bias)


def _linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    return _faster("linear_dx", dy, weight).linear_dx(dy, weight)


def _linear_plus_slice(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_slice: Tensor, delta: Tensor
) -> Tensor:
    """In one launch where that was measured to be faster; else the dense product, then the rest."""
    from s2kernels import kernels

    if _fuses("linear_plus_slice", x, weight, x_slice):
        return kernels.linear_plus_slice(x, weight, bias, x_slice, delta)
    return kernels.slice_linear_(_linear(x, weight, bias), x_slice, delta, None, "in")


def _linear_dx_plus_slice(dy: Tensor, weight: Tensor, dy_slice: Tensor, delta: Tensor) -> Tensor:
    """As `_linear_plus_slice`."""
    from s2kernels import kernels

    if _fuses("linear_dx_plus_slice", dy, weight, dy_slice):
        return kernels.linear_dx_plus_slice(dy, weight, dy_slice, delta)
    return kernels.slice_linear_(_linear_dx(dy, weight), dy_slice, delta.t(), None, "in")


def _fuses(op: str, x: Tensor, weight: Tensor, x_slice: Tensor) -> bool:
    """Whether the one launch was measured to be faster, and is one launch with this x_slice."""
    if _faster(op, x, weight) is reference:
        return False
    from s2kernels.kernels.target import takes_descriptors

    return takes_descriptors(x_slice)


def _linear_dx_swiglu_bwd(
    dy: Tensor,
    weight: Tensor,
    gate: Tensor,
    up: Tensor,
    index: Tensor | slice | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In one launch where that was measured to be faster; else the dense product, then SwiGLU's."""
    from s2kernels import kernels

    if _faster("linear_dx_swiglu_bwd", dy, weight) is kernels:
        return kernels.linear_dx_swiglu_bwd(dy, weight, gate, up, index, out)
    return kernels.swiglu_bwd(_linear_dx(dy, weight), gate, up, index, out)


def _faster(op: str, x: Tensor, weight: Tensor) -> ModuleType:
    """Torch, unless Triton was measured to be faster; under torch.compile, which has its own choice
    of GEMMs, always torch.
    """
    if torch.compiler.is_compiling():
        return reference
    from s2kernels import kernels
    from s2kernels.kernels.target import measured_faster

    return kernels if measured_faster(op, x, weight) else reference
