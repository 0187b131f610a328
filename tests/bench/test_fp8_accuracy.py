"""The emulation of a frozen base in fp8: its products, its gradients, and what it leaves exact."""

import pytest
import torch
from torch import nn

from bench import fp8_accuracy
from bench.fp8_accuracy import PARTS, Frozen, Sliced, product, quantize_rows


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_row_errs_by_half_a_bit_of_the_mantissa():
    x = randn(9, 50).float() * torch.logspace(-6, 6, 9)[:, None]
    x[3] = 0
    q, scale = quantize_rows(x)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (9, 1)
    back = q.float() * scale
    # normal numbers are within half a bit, 2^-4; below 2^-6 of the scale the step is constant
    assert ((back - x).abs() <= x.abs() * 2**-4 + scale * 2**-10).all()
    assert torch.equal(back[3], x[3])


@pytest.mark.parametrize("quantize_x", [False, True])
@pytest.mark.parametrize("quantize_weight", [False, True])
def test_a_product_is_that_of_what_its_operands_were_rounded_to(quantize_x, quantize_weight):
    x, weight = randn(5, 13).float(), randn(7, 13, seed=1).float()

    def rounded(tensor, wanted):
        q, scale = quantize_rows(tensor)
        return (q.double() * scale) if wanted else tensor.double()

    exact = rounded(x, quantize_x) @ rounded(weight, quantize_weight).t()
    actual = product(x, weight, quantize_x, quantize_weight)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


def test_what_is_quantised_is_what_a_case_says():
    x, weight, dy = randn(4, 6).float(), randn(5, 6, seed=1).float(), randn(4, 5, seed=2).float()
    for parts in PARTS.values():
        given = x.clone().requires_grad_()
        y = Frozen.apply(given, weight, frozenset(parts))
        assert torch.equal(y, x @ weight.t()) == (not parts & {"x", "w"})
        y.backward(dy)
        assert torch.equal(given.grad, dy @ weight) == (not parts & {"dy", "wt"})


@pytest.mark.parametrize("dim", ["in", "out"])
def test_the_slice_stays_exact(dim):
    """Where all channels are trained, nothing is left to quantise."""
    linear = nn.Linear(6, 5, bias=False)
    layer = Sliced(linear, dim, torch.arange(6 if dim == "in" else 5))
    layer.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    x = randn(3, 4, 6).float()
    results = []
    for parts in (set(), PARTS["all"]):
        layer.parts = frozenset(parts)
        given = x.clone().requires_grad_()
        y = layer(given)
        results.append([y, *torch.autograd.grad(y.square().sum(), (given, layer.delta))])
    for bf16, fp8 in zip(*results, strict=True):
        torch.testing.assert_close(fp8, bf16)


def test_cosines():
    gradients = {f"model.layers.{i}.mlp.{n}.delta": randn(3, 4, seed=i) for i, n in enumerate("ab")}
    same = fp8_accuracy.cosines(gradients, gradients)
    assert same["least"] == pytest.approx(1) and same["share_that_passes"] == 1
    other = dict(
        gradients, **{"model.layers.1.mlp.b.delta": -gradients["model.layers.1.mlp.b.delta"]}
    )
    result = fp8_accuracy.cosines(gradients, other)
    assert result["least"] == pytest.approx(-1) and result["share_that_passes"] == 0.5
    assert result["least_by_kind"] == pytest.approx({"a": 1, "b": -1})
