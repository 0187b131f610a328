"""Gradients that the moments of AdamW use up, and the values that follow from those."""

import importlib

import pytest
import torch
from layouts import LAYOUTS, slice_operands
from numerics import assert_as_accurate

from s2kernels import kernels, reference
from s2kernels.moments import Moments

slice_grad_module = importlib.import_module("s2kernels.kernels.slice_grad")
BETAS = (0.85, 0.97)
# (M, N, K, R): aligned; odd in every dimension and past one tile; one of everything; no tokens
SHAPES = [(64, 128, 128, 32), (45, 137, 131, 67), (1, 1, 1, 1), (0, 9, 7, 3)]


def moments(shape, device):
    return torch.randn(shape, device=device), torch.rand(shape, device=device)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["run", "any", "compact"])
@pytest.mark.parametrize("dim", ["in", "out"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_use_the_gradient_up(shape, dim, kind, layout, num_splits, device, monkeypatch):
    monkeypatch.setattr(slice_grad_module, "MIN_TOKENS_PER_SPLIT", 16)
    monkeypatch.setattr(slice_grad_module, "_choose_splits", lambda *args: num_splits)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dy, x, index = slice_operands(shape, dim, kind, dtype, device, layout)
    slice_shape = (shape[1], shape[3]) if dim == "in" else (shape[3], shape[2])
    given = moments(slice_shape, device)

    def updated(ops, wide=None):
        dtypes = [x.dtype if wide is None else wide for x in (dy, x, *given)]
        a, b, m, v = (
            each.to(dtype, copy=True) for each, dtype in zip((dy, x, *given), dtypes, strict=True)
        )
        result = ops.slice_grad(a, b, index, dim, Moments(m, v, BETAS))
        assert result is m
        return m, v

    exact = updated(reference, torch.float64)
    for actual, true, eager in zip(updated(kernels), exact, updated(reference), strict=True):
        assert_as_accurate(actual, true, eager)


def test_the_moments_are_those_of_adam(device):
    """Of algorithm 1, by hand."""
    dy, x = (torch.randn(7, size, dtype=torch.float64, device=device) for size in (5, 3))
    m, v = (each.double() for each in moments((5, 3), device))
    grad = dy.t() @ x
    want = BETAS[0] * m + (1 - BETAS[0]) * grad, BETAS[1] * v + (1 - BETAS[1]) * grad**2
    reference.slice_grad(dy, x, None, "in", Moments(m, v, BETAS))
    torch.testing.assert_close((m, v), want)


@pytest.mark.parametrize("ops", [kernels, reference])
def test_fp16_is_refused_before_anything_changes(ops, device):
    dy, x = (torch.randn(4, size, device=device).half() for size in (5, 3))
    m, v = moments((5, 3), device)
    before = m.clone(), v.clone()
    with pytest.raises(TypeError, match="must not train in float16"):
        ops.slice_grad(dy, x, None, "in", Moments(m, v, BETAS))
    assert torch.equal(m, before[0]) and torch.equal(v, before[1])


@pytest.mark.parametrize("num", [0, 1, 1000, 5000])
def test_values(num, device):
    """Whatever the moments are, zero included."""
    given = [torch.randn(num, device=device), *moments((num,), device)]
    for each in given[1:]:
        each[::7] = 0
    coefficients = torch.tensor([0.99, 0.3, 1.7], device=device)

    def updated(ops, dtype=torch.float32):
        p, m, v, c = (x.to(dtype, copy=True) for x in (*given, coefficients))
        assert ops.adamw_values_(p, m, v, c, 1e-8) is None
        assert torch.equal(m, given[1].to(dtype)) and torch.equal(v, given[2].to(dtype))
        return p

    exact = updated(reference, torch.float64)
    assert_as_accurate(updated(kernels), exact, updated(reference))
    p, m, v = (x.double() for x in given)
    decay, step_size, correction = coefficients.double()
    torch.testing.assert_close(exact, decay * p - step_size * m / (v.sqrt() * correction + 1e-8))
