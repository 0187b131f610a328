"""Dense linear in Triton against plain torch."""

import pytest
import torch
from layouts import LAYOUTS, contiguous
from numerics import assert_as_accurate

from s2kernels import backend, kernels, reference
from s2kernels.kernels import target, tuned

# (M, N, K): aligned; odd in every dimension and past one tile; one token, and one of everything; no
# tokens.
SHAPES = [(128, 256, 128), (131, 141, 77), (1, 24, 40), (1, 1, 1), (0, 19, 17)]


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


@pytest.mark.parametrize("tokens", [(), (3, 5), (2, 0), (2, 3, 4)])
def test_linear_of_tokens_in_any_shape(tokens, dtype, device):
    t = _operands((1, 24, 40), dtype, device)
    _check("linear", torch.randn(*tokens, 40, device=device).to(dtype), t["weight"], t["bias"])


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


def test_programs_that_take_several_tiles(monkeypatch, device):
    """Tiles are more than programs, and the last band of rows and of columns is short."""
    if device.type == "cpu":
        monkeypatch.setattr(target, "WITHOUT_GPU", target.Chip("none", "sm_90", 2))
    M, N, K = (600, 520, 72) if device.type == "cpu" else (2600, 6000, 72)
    t = _operands((M, N, K), torch.float16, device)
    assert target.takes_descriptors(t["x"], t["weight"]) or device.type == "cuda"
    _check("linear", t["x"], t["weight"], t["bias"])
    _check("linear_dx", t["dy"], t["weight"])


@pytest.mark.parametrize("launch", [dict(HALVES=False), dict(BLOCK_C=64, BLOCK_D=16), {}])
def test_measured_launches(monkeypatch, launch, device):
    if not target.has_descriptors(device):
        pytest.skip("no descriptors on this chip")
    arch = target.chip(device).arch
    default = dict(kernels.linear.__globals__["DESCRIPTOR_LAUNCH"][arch], num_stages=2)
    for op in ("linear", "linear_dx"):
        table = {(96, 80): {64: {**default, **launch} if launch else {}}}
        monkeypatch.setitem(tuned.LAUNCH, (arch, op, "half"), table)
    t = _operands((72, 96, 80), torch.float16, device)
    _check("linear", t["x"], t["weight"], t["bias"])
    _check("linear_dx", t["dy"], t["weight"])


def test_the_next_larger_measurement_counts(monkeypatch, device):
    measured = {64: {"BLOCK": 1}, 512: {"BLOCK": 2}, 1024: {}}
    key = target.chip(device).arch, "op", "half"
    monkeypatch.setitem(tuned.LAUNCH, key, {(8, 4): measured})
    x, default = torch.empty(0, dtype=torch.bfloat16, device=device), {"BLOCK": 3}
    found = [
        target.tuned_parameters("op", x, (8, 4), tokens, default)["BLOCK"]
        for tokens in (1, 64, 65, 512, 600, 9999)
    ]
    assert found == [1, 1, 2, 2, 3, 3]
    assert target.tuned_parameters("op", x, (4, 8), 64, default) is default
    assert target.tuned_parameters("op", x.float(), (8, 4), 64, default) is default


def test_torch_is_taken_where_triton_did_not_win(monkeypatch, device):
    weight = torch.zeros(24, 16, dtype=torch.float16, device=device)
    key = target.chip(device).name, "linear", "float16"
    monkeypatch.setitem(tuned.FASTER, key, {(24, 16): ((2, 4), (8, 8))})

    def implementation(tokens, op="linear", weight=weight):
        x = torch.zeros(tokens, 16, dtype=weight.dtype, device=device)
        return backend._faster(op, x, weight)

    won = [tokens for tokens in range(10) if implementation(tokens) is kernels]
    assert won == [2, 3, 4, 8]
    assert implementation(4, "linear_dx") is reference
    assert implementation(4, weight=weight.float()) is reference
    assert implementation(4, weight=torch.zeros(16, 24).half().to(device).t()) is reference
    assert implementation(4, weight=weight[:12]) is reference


def test_float64_is_refused(device):
    x = torch.randn(2, 2, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="float64"):
        kernels.linear(x, x)
