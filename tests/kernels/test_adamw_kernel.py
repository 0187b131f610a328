"""Gradients that a step of AdamW uses up: values, moments and the slice of the weight."""

import importlib

import pytest
import torch
from layouts import LAYOUTS, slice_operands, transposed
from numerics import DTYPES, assert_as_accurate

from s2kernels import kernels, reference
from s2kernels.update import Update, WeightSlice

slice_grad_module = importlib.import_module("s2kernels.kernels.slice_grad")
# an eps that does not blow up the rounding of a gradient near zero where the moments are zero
BETAS, EPS = (0.85, 0.97), 0.1
COEFFICIENTS = (0.99, 0.3, 1.7)
# (M, N, K, R): aligned; odd in every dimension and past one tile; one of everything; no tokens
SHAPES = [(64, 128, 128, 32), (45, 137, 131, 67), (1, 1, 1, 1), (0, 9, 7, 3)]


def states(shape, device):
    """Values and moments, some of which are zero; no others so small that they blow errors up."""
    values, exp_avg, exp_avg_sq = (torch.randn(shape, device=device) for _ in range(3))
    exp_avg_sq = exp_avg_sq.abs() + 0.2
    exp_avg[::3, ::5] = exp_avg_sq[::3, ::5] = 0
    return values, exp_avg, exp_avg_sq


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["run", "any", "compact"])
@pytest.mark.parametrize("dim", ["in", "out"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_uses_the_gradient_up(shape, dim, kind, layout, num_splits, device, monkeypatch):
    """The weight is as odd as the operands; its slice is written where the operand is compact."""
    monkeypatch.setattr(slice_grad_module, "MIN_TOKENS_PER_SPLIT", 16)
    monkeypatch.setattr(slice_grad_module, "_choose_splits", lambda *args: num_splits)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dy, x, index = slice_operands(shape, dim, kind, dtype, device, layout)
    _, N, K, R = shape
    given = states((N, R) if dim == "in" else (R, K), device)
    where = index
    if index is None:
        size = K if dim == "in" else N
        where = torch.randperm(size, device=device)[:R].int() if R % 2 else slice(size - R, size)
    weight = (
        torch.randn(K, N, device=device).t()
        if layout is transposed
        else torch.randn(N, K).to(device)
    )
    axis = 1 if dim == "in" else 0
    at = torch.arange(N if axis == 0 else K, device=device)[where]
    base = torch.randn_like(given[0]).to(dtype)

    def updated(ops, wide=None):
        one, other, *tensors = (
            each.to(wide or each.dtype, copy=True) for each in (dy, x, *given, base, weight)
        )
        p, m, v, base_slice, w = tensors
        coefficients = torch.tensor(COEFFICIENTS, dtype=p.dtype, device=device)
        written = WeightSlice(w, base_slice, where, dim)
        update = Update(p, m, v, coefficients, BETAS, EPS, written)
        assert ops.slice_grad(one, other, index, dim, update) is p
        assert torch.equal(w.index_select(axis, at), base_slice + p)
        others = torch.ones(w.shape[axis], dtype=torch.bool, device=device)
        others[at] = False
        kept = others.nonzero().flatten()
        assert torch.equal(w.index_select(axis, kept), weight.to(w.dtype).index_select(axis, kept))
        return p, m, v

    exact = updated(reference, torch.float64)
    for actual, true, eager in zip(updated(kernels), exact, updated(reference), strict=True):
        assert_as_accurate(actual, true, eager)


@pytest.mark.parametrize("ops", [kernels, reference])
@pytest.mark.parametrize("dim", ["in", "out"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_slice_is_rounded_once_into_a_weight_of_half_precision(ops, dim, dtype, device):
    """The delta is in fp32."""
    dy, x = torch.randn(20, 12, device=device), torch.randn(20, 10, device=device)
    given = states((12, 4) if dim == "in" else (4, 10), device)
    weight = torch.randn(12, 10, device=device).to(dtype)
    axis = 1 if dim == "in" else 0
    base = weight.narrow(axis, 3, 4).clone()
    coefficients = torch.tensor(COEFFICIENTS, device=device)
    written = WeightSlice(weight, base, slice(3, 7), dim)
    ops.slice_grad(dy, x, slice(3, 7), dim, Update(*given, coefficients, BETAS, EPS, written))
    want = (base.float() + given[0]).to(dtype)
    assert torch.equal(weight.narrow(axis, 3, 4), want)


@pytest.mark.parametrize("ops", [kernels, reference])
def test_without_a_weight_the_values_alone_are_written(ops, device):
    dy, x = torch.randn(20, 12, device=device), torch.randn(20, 4, device=device)
    values, exp_avg, exp_avg_sq = states((12, 4), device)
    before = values.double(), exp_avg.double(), exp_avg_sq.double()
    coefficients = torch.tensor(COEFFICIENTS, device=device)
    ops.slice_grad(dy, x, None, "in", Update(values, exp_avg, exp_avg_sq, coefficients, BETAS, EPS))
    for got, want in zip((values, exp_avg, exp_avg_sq), by_hand(dy, x, *before), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_the_step_is_that_of_adamw(device):
    """Of algorithm 2, by hand."""
    dy, x = (torch.randn(7, size, dtype=torch.float64, device=device) for size in (5, 3))
    given = [each.double() for each in states((5, 3), device)]
    want = by_hand(dy, x, *given)
    coefficients = torch.tensor(COEFFICIENTS, dtype=torch.float64, device=device)
    reference.slice_grad(dy, x, None, "in", Update(*given, coefficients, BETAS, EPS))
    torch.testing.assert_close(tuple(given), want)


def by_hand(dy, x, p, m, v):
    grad = dy.double().t() @ x.double()
    m = BETAS[0] * m + (1 - BETAS[0]) * grad
    v = BETAS[1] * v + (1 - BETAS[1]) * grad**2
    decay, step_size, correction = COEFFICIENTS
    return decay * p - step_size * m / (v.sqrt() * correction + EPS), m, v
