"""Dense linear in Triton against plain torch."""

import pytest
import torch
from layouts import LAYOUTS, contiguous
from numerics import assert_as_accurate

from s2kernels import kernels, reference

# (M, N, K): aligned; odd in every dimension and past one tile; one of everything; no tokens.
SHAPES = [(128, 256, 128), (131, 141, 77), (1, 1, 1), (0, 19, 17)]


def _operands(shape, dtype, device, layout=contiguous):
    M, N, K = shape
    sizes = {"x": (M, K), "dy": (M, N), "weight": (N, K)}
    operands = {
        name: layout(torch.randn(size, device=device).to(dtype)) for name, size in sizes.items()
    }
    # Every other entry of a longer tensor: a bias may be strided as well.
    operands["bias"] = torch.randn(2 * N, device=device).to(dtype)[::2]
    return operands


def _check(op, *args):
    exact = getattr(reference, op)(*(arg.double() for arg in args))
    assert_as_accurate(getattr(kernels, op)(*args), exact, getattr(reference, op)(*args))


@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape, dtype, device):
    t = _operands(shape, dtype, device)
    _check("linear", t["x"], t["weight"])
    _check("linear", t["x"], t["weight"], t["bias"])


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_dx(shape, dtype, device):
    t = _operands(shape, dtype, device)
    _check("linear_dx", t["dy"], t["weight"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    t = _operands((37, 45, 51), dtype, device, layout)
    _check("linear", t["x"], t["weight"], t["bias"])
    _check("linear_dx", t["dy"], t["weight"])


def test_many_bands_of_tiles(monkeypatch, device):
    """Every tile is visited once, also where the last band of rows is short."""
    x, weight = (
        torch.randn(5 * 64 + 1, 16, device=device),
        torch.randn(2 * 64 + 1, 16, device=device),
    )
    launch = kernels.linear.__globals__["LAUNCH"]["float32"]
    monkeypatch.setitem(launch, "GROUP_M", 4)
    _check("linear", x, weight)


def test_float64_is_refused(device):
    x = torch.randn(2, 2, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="float64"):
        kernels.linear(x, x)
