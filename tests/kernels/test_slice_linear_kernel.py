"""The slice's part of a linear layer in Triton against plain torch."""

import pytest
import torch
from layouts import LAYOUTS, contiguous, make_index
from numerics import assert_as_accurate

from s2kernels import kernels, reference

# (M, N, K, R): aligned; odd in every dimension and past one tile; one of everything; no tokens.
SHAPES = [(128, 128, 256, 64), (131, 141, 137, 67), (1, 1, 1, 1), (0, 9, 7, 3)]
OPS = ["slice_linear_", "slice_linear_dx_"]


@pytest.fixture(params=["run", "any"])
def kind(request):
    return request.param


def _operands(op, shape, dim, kind, dtype, device, layout=contiguous):
    """result, operand, delta, index; delta in fp32, as it is trained."""
    M, N, K, R = shape
    index = make_index(kind, K if dim == "in" else N, R, device)
    delta = layout(torch.randn((N, R) if dim == "in" else (R, K), device=device))
    widths = (N, K) if op == "slice_linear_" else (K, N)
    result, operand = (layout(torch.randn(M, w, device=device).to(dtype)) for w in widths)
    return result, operand, delta, index


def _check(op, result, operand, delta, index, dim):
    expected = getattr(reference, op)
    exact = expected(result.double(), operand.double(), delta.double(), index, dim)
    eager = expected(result.clone(), operand, delta, index, dim)
    before = result.clone()
    assert getattr(kernels, op)(result, operand, delta, index, dim) is result
    assert_as_accurate(result, exact, eager)
    if (op, dim) in (("slice_linear_", "out"), ("slice_linear_dx_", "in")):
        untouched = torch.ones(result.shape[1], dtype=torch.bool, device=result.device)
        untouched[index if isinstance(index, slice) else index.long()] = False
        assert result[:, untouched].equal(before[:, untouched])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_slice_linear(op, shape, dim, kind, dtype, device):
    _check(op, *_operands(op, shape, dim, kind, dtype, device), dim)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(op, layout, dim, kind, dtype, device):
    _check(op, *_operands(op, (37, 45, 51, 9), dim, kind, dtype, device, layout), dim)


@pytest.mark.parametrize("op", OPS)
def test_delta_in_half(op, dim, kind, device):
    """A delta need not be in fp32, nor in the dtype of the activations."""
    y, x, delta, index = _operands(op, (37, 45, 51, 9), dim, kind, torch.float32, device)
    _check(op, y, x, delta.half(), index, dim)


@pytest.mark.parametrize("shape", SHAPES)
def test_compact_operand(shape, dtype, device):
    y, x, delta, index = _operands("slice_linear_", shape, "in", "any", dtype, device)
    _check("slice_linear_", y, reference.take(x, index), delta, None, "in")
