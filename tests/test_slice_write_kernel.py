"""Writing every slice of a model in one launch, against plain torch, bit for bit."""

import importlib

import pytest
import torch
from layouts import LAYOUTS, contiguous, make_index

from s2kernels import kernels, reference

module = importlib.import_module("s2kernels.kernels.slice_write")

INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# (N, K, R): aligned; odd and past one tile; one of everything.
SHAPES = [(64, 128, 32), (67, 131, 65), (1, 1, 1)]


def _slices(dtype, device, shapes=SHAPES, layout=contiguous, kinds=("run", "any")):
    """The arguments of slice_write for both dims and kinds of index at every shape."""
    weights, bases, deltas, indices, dims = [], [], [], [], []
    for N, K, R in shapes:
        for dim in ("in", "out"):
            for kind in kinds:
                slice_shape = (N, R) if dim == "in" else (R, K)
                weights.append(layout(torch.randn(N, K, device=device).to(dtype)))
                bases.append(layout(torch.randn(slice_shape, device=device).to(dtype)))
                deltas.append(layout(torch.randn(slice_shape, device=device)))
                indices.append(make_index(kind, K if dim == "in" else N, R, device))
                dims.append(dim)
    return weights, bases, deltas, indices, dims


def _bits(x):
    return x.contiguous().view(INTEGERS[x.dtype])


def _check(weights, *rest):
    expected = [weight.clone() for weight in weights]
    versions = [weight._version for weight in weights]
    reference.slice_write(expected, *rest)
    kernels.slice_write(weights, *rest)
    # Entries outside of the slices are compared as well.
    for weight, one in zip(weights, expected, strict=True):
        assert _bits(weight).equal(_bits(one))
    assert [weight._version for weight in weights] == versions


@pytest.fixture
def launches(monkeypatch):
    """The grids that the kernel was launched with."""
    grids, kernel = [], module._slice_write_kernel

    class Spy:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_slice_write_kernel", Spy())
    return grids


@pytest.mark.parametrize("kinds", [("run",), ("any",), ("run", "any")])
def test_slice_write(kinds, dtype, device, launches):
    _check(*_slices(dtype, device, kinds=kinds))
    assert len(launches) == 1


@pytest.mark.parametrize("shape", [(37, 45, 9), (32, 48, 16)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, shape, dtype, device):
    _check(*_slices(dtype, device, [shape], layout))


@pytest.mark.parametrize("kinds", [("run",), ("run", "any")])
def test_wide_accesses(kinds, dtype, device, monkeypatch):
    """Where everything is a multiple of 16, the kernel is told so, and still right."""
    told = []
    table = module._table
    monkeypatch.setattr(module, "_table", lambda *args: told.append(table(*args)) or told[-1])
    _check(*_slices(dtype, device, [(64, 128, 32), (32, 64, 16)], kinds=kinds))
    ((*_, has_index, aligned),) = told
    assert aligned
    assert has_index == ("any" in kinds)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_restores_bit_for_bit(dtype, device):
    """Every bit pattern, NaN payloads and negative zeros among them, survives."""
    weights, bases, _, indices, dims = _slices(dtype, device)
    integer = INTEGERS[dtype]
    limits = torch.iinfo(integer)
    bases = [
        torch.randint(limits.min, limits.max, base.shape, dtype=integer, device=device).view(dtype)
        for base in bases
    ]
    bases[0][0, :2] = torch.tensor([-0.0, float("nan")])
    deltas = [None] * len(bases)
    _check(weights, bases, deltas, indices, dims)
    assert _bits(weights[0][:, indices[0]]).equal(_bits(bases[0]))


def test_write_then_restore(dtype, device):
    weights, _, deltas, indices, dims = _slices(dtype, device)
    before = [weight.clone() for weight in weights]
    bases = [
        weight.index_select(axis, torch.arange(index.start, index.stop, device=device))
        if isinstance(index, slice)
        else weight.index_select(axis, index)
        for weight, index, axis in zip(
            weights, indices, [1 if dim == "in" else 0 for dim in dims], strict=True
        )
    ]
    kernels.slice_write(weights, bases, deltas, indices, dims)
    assert not any(w.equal(b) for w, b in zip(weights, before, strict=True))
    kernels.slice_write(weights, bases, [None] * len(bases), indices, dims)
    assert all(w.equal(b) for w, b in zip(weights, before, strict=True))


def test_some_slices_without_a_delta_share_the_launch(dtype, device, launches):
    weights, bases, deltas, indices, dims = _slices(dtype, device)
    deltas[1::2] = [None] * len(deltas[1::2])
    _check(weights, bases, deltas, indices, dims)
    assert len(launches) == 1


def test_one_launch_for_each_combination_of_dtypes(device, launches):
    halves, floats = _slices(torch.float16, device), _slices(torch.float32, device)
    weights, bases, deltas, indices, dims = (h + f for h, f in zip(halves, floats, strict=True))
    bases[0] = bases[0].float()
    deltas[1] = deltas[1].half()
    _check(weights, bases, deltas, indices, dims)
    assert len(launches) == 4


def test_sum_is_rounded_once(device):
    """1 + 2⁻¹¹ + 2⁻²² in fp16: a delta rounded first is 2⁻¹¹, a tie, and the sum then 1."""
    weight = torch.zeros(1, 1, dtype=torch.float16, device=device)
    base = torch.ones_like(weight)
    delta = torch.full((1, 1), 2**-11 + 2**-22, device=device)
    kernels.slice_write([weight], [base], [delta], [slice(0, 1)], ["in"])
    assert weight.item() == 1 + 2**-10


def test_same_tensors_reuse_the_table(device):
    args = _slices(torch.float32, device)
    kernels.slice_write(*args)
    before = module._table.cache_info()
    args[2][0].add_(1.0)
    _check(*args)
    after = module._table.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_autograd_does_not_see_the_write(device):
    """A weight saved for backward stays usable."""
    weight = torch.randn(4, 4, device=device)
    x = torch.randn(3, 4, device=device, requires_grad=True)
    y = x @ weight.t()
    base = torch.ones(4, 2, device=device)
    kernels.slice_write([weight], [base], [torch.ones_like(base)], [slice(1, 3)], ["in"])
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 4))


def test_nothing_to_write(launches):
    kernels.slice_write([], [], [], [], [])
    assert launches == []
