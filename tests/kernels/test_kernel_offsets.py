"""Offsets that do not fit 32 bits: three rows, 2³⁰ elements apart."""

import numpy as np
import pytest
import torch
from layouts import make_index
from numerics import assert_as_accurate

from s2kernels import kernels, reference
from s2kernels.groups import make_groups

ROWS, COLS, STRIDE = 3, 9, 2**30


@pytest.fixture(scope="module")
def memory(device):
    """One row after another of a tensor of 4 GiB, of which only the pages in use exist on CPU."""
    size = (ROWS - 1) * STRIDE + 16 * COLS
    if device.type == "cuda":
        return torch.zeros(size, dtype=torch.float16, device=device)
    return torch.from_numpy(np.zeros(size, dtype=np.float16))


@pytest.fixture
def far(memory):
    """A function that makes a random (ROWS, COLS) of which the last row lies beyond 32 bits."""
    made = []

    def make():
        view = memory.as_strided((ROWS, COLS), (STRIDE, 1), len(made) * COLS)
        made.append(view)
        return view.copy_(torch.randn(ROWS, COLS))

    return make


def _check(op, *args):
    double = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    exact = getattr(reference, op)(*double)
    eager = getattr(reference, op)(*(a.clone() if torch.is_tensor(a) else a for a in args))
    assert_as_accurate(getattr(kernels, op)(*args), exact, eager)


def test_linear(far):
    _check("linear", far(), far())
    _check("linear_dx", far()[:, :ROWS], far())


@pytest.mark.parametrize("dim", ["in", "out"])
def test_slice_grad(far, dim, device):
    _check("slice_grad", far(), far(), make_index("any", COLS, 4, device), dim)
    # An in-slice of two channels, so that the gradient has three rows as well.
    dy, x, out = far()[:, :ROWS], far(), far()[:, :2]
    _check("slice_grad", dy, x, make_index("any", COLS, 2, device), "in", out)


@pytest.mark.parametrize("dim", ["in", "out"])
def test_slice_grad_each(far, dim, device):
    offsets = torch.tensor([1, 1, ROWS], dtype=torch.int32, device=device)
    index = torch.stack([make_index("any", COLS, 4, device) for _ in offsets])
    out = torch.randn((3, COLS, 4) if dim == "in" else (3, 4, COLS), device=device)
    _check("slice_grad_each", far(), far(), offsets, index, dim, out)
    # Gradients of three experts that lie as far apart.
    out = far().unsqueeze(2) if dim == "in" else far().unsqueeze(1)
    _check("slice_grad_each", far(), far(), offsets, slice(2, 3), dim, out)


def test_swiglu(far, device):
    dh, gate, up, index = far(), far(), far(), make_index("any", COLS, 4, device)
    _check("swiglu", gate, up)
    double = (dh.double(), gate.double(), up.double())
    results = [
        kernels.swiglu_bwd(dh, gate, up, index),
        reference.swiglu_bwd(*double, index),
        reference.swiglu_bwd(dh, gate, up, index),
    ]
    for result in zip(*results, strict=True):
        assert_as_accurate(*result)


@pytest.mark.parametrize("dim", ["in", "out"])
def test_slice_linear(far, dim, device):
    delta = torch.randn((COLS, 4) if dim == "in" else (4, COLS), device=device)
    _check("slice_linear_", far(), far(), delta, make_index("any", COLS, 4, device), dim)
    _check("slice_linear_dx_", far(), far(), delta, make_index("any", COLS, 4, device), dim)


@pytest.mark.parametrize("op", ["grouped_in_", "grouped_out_"])
@pytest.mark.parametrize("size", [1, ROWS])
def test_grouped(far, op, size, device):
    group = torch.tensor([-1] * (ROWS - size) + [0] * size)
    groups = make_groups(group, [torch.arange(ROWS)], [torch.tensor([7, 0, 4])], device)
    _check(op, far(), far(), far(), groups)


@pytest.mark.parametrize("kind", ["run", "any"])
def test_slice_write(far, kind, device):
    weight, base, index = far(), far()[:, :4], make_index(kind, COLS, 4, device)
    expected = weight.clone()
    reference.slice_write([expected], [base], [None], [index], ["in"])
    kernels.slice_write([weight], [base], [None], [index], ["in"])
    assert weight.equal(expected)
