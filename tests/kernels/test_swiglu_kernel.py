"""SwiGLU in Triton against plain torch."""

import pytest
import torch
from layouts import LAYOUTS, contiguous, make_index
from numerics import assert_as_accurate

from s2kernels import kernels, reference
from s2kernels.kernels.swiglu import slice_of_swiglu

# (M, K, R): aligned; odd and past one tile, slice too; one of everything; no tokens.
SHAPES = [(4, 1024, 64), (3, 2077, 1031), (1, 1, 1), (0, 11, 4)]


def _operands(shape, dtype, device, layout=contiguous):
    return [layout(torch.randn(shape, device=device).to(dtype)) for _ in range(3)]


def _check_bwd(dh, gate, up, index):
    exact = reference.swiglu_bwd(dh.double(), gate.double(), up.double(), index)
    eager = reference.swiglu_bwd(dh, gate, up, index)
    actual = kernels.swiglu_bwd(dh, gate, up, index)
    for results in zip(actual, exact, eager, strict=True):
        if index is None and results[1] is None:
            assert results == (None, None, None)
        else:
            assert_as_accurate(*results)
    assert actual[2] is None or actual[2].is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape, dtype, device):
    M, K, _ = shape
    _, gate, up = _operands((M, K), dtype, device)
    exact = reference.swiglu(gate.double(), up.double())
    assert_as_accurate(kernels.swiglu(gate, up), exact, reference.swiglu(gate, up))


@pytest.mark.parametrize("kind", ["run", "any", None])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_bwd(shape, dtype, kind, device):
    M, K, R = shape
    index = None if kind is None else make_index(kind, K, R, device)
    _check_bwd(*_operands((M, K), dtype, device), index)


@pytest.mark.parametrize("kind", ["run", "any"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, kind, dtype, device):
    dh, gate, up = _operands((5, 45), dtype, device, layout)
    exact = reference.swiglu(gate.double(), up.double())
    assert_as_accurate(kernels.swiglu(gate, up), exact, reference.swiglu(gate, up))
    _check_bwd(dh, gate, up, make_index(kind, 45, 9, device))
    _check_bwd(contiguous(dh), gate, contiguous(up), make_index(kind, 45, 9, device))


@pytest.mark.parametrize("ops", (kernels, reference), ids=("triton", "torch"))
@pytest.mark.parametrize("kind", ["run", "any", None])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_over_gate_and_up(shape, dtype, kind, ops, device):
    """In two tensors, and in the halves of one; the slice of h is that of before."""
    M, K, R = shape
    index = None if kind is None else make_index(kind, K, R, device)
    dh, gate, up = _operands((M, K), dtype, device)
    want = ops.swiglu_bwd(dh, gate, up, index)
    whole = torch.cat([gate, up], 1)
    for operands in ((gate.clone(), up.clone()), whole.split(K, 1)):
        out = ops.swiglu_bwd(dh, *operands, index, out=operands)
        assert out[0] is operands[0] and out[1] is operands[1]
        for got, expected in zip(out, want, strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected)
    torch.testing.assert_close(whole, torch.cat(want[:2], 1))


@pytest.mark.parametrize("kind", ["run", "any"])
def test_slice_of_swiglu(kind, dtype, device):
    _, gate, up = _operands((5, 45), dtype, device)
    index = make_index(kind, 45, 9, device)
    h = kernels.swiglu(gate, up)
    got = slice_of_swiglu(gate, up, index)
    assert torch.equal(got, reference.take(h, index)) and got.is_contiguous()


def test_saturated_gates(dtype, device):
    """exp(-gate) overflows for one end and vanishes at the other; neither makes a NaN."""
    gate = torch.tensor([[-200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 200.0]], device=device).to(dtype)
    up = torch.full_like(gate, 2.0)
    exact = reference.swiglu(gate.double(), up.double())
    assert_as_accurate(kernels.swiglu(gate, up), exact, reference.swiglu(gate, up))
    _check_bwd(torch.ones_like(gate), gate, up, slice(0, 7))
