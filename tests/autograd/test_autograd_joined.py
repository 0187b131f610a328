"""Weights that lie one after the other, and the linear layers that they make one GEMM of."""

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_accurate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure.memory import kept_by, storages
from s2kernels import backend
from s2kernels.autograd.joined import is_alone, join_, joined, joined_linear, runs_of

GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_")


def frozen(*shape, dtype=torch.float64, device="cpu"):
    return nn.Parameter(torch.randn(*shape, dtype=dtype, device=device), requires_grad=False)


class Products(TorchDispatchMode):
    """The dense products that are dispatched, by the columns of their results."""

    def __init__(self):
        super().__init__()
        self.columns = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in GEMMS:
            self.columns.append(result.shape[-1])
        return result


def test_joined_weights_stay_the_parameters_they_were():
    first, second, third = frozen(5, 3), frozen(2, 3), frozen(4, 3)
    values = torch.cat([first, second, third]).clone()
    assert joined(first, second) is None
    old = weakref.ref(second.untyped_storage())
    parameters = [id(p) for p in (first, second, third)]
    join_(first, second, third)
    assert [id(p) for p in (first, second, third)] == parameters
    assert old() is None or len(storages([first, second, third])) == 1
    assert torch.equal(joined(first, second, third), values)
    assert torch.equal(joined(second, third), values[5:])
    assert joined(second, first) is None and joined(first, third) is None

    # what is written into one of them is in the whole, and the other way round
    version = second._version
    second.copy_(second.flip(0))
    assert torch.equal(joined(first, second)[5:], values[5:7].flip(0))
    assert second._version > version
    whole = joined(first, second)
    join_(first, second)
    assert joined(first, second).data_ptr() == whole.data_ptr()


def test_joining_takes_no_lasting_memory():
    weights = [frozen(64, 8) for _ in range(3)]
    before = sum(storages(weights).values())
    join_(*weights)
    assert sum(storages(weights).values()) == before


@pytest.mark.parametrize("change", ("to", "data"))
def test_weights_that_were_moved_are_not_joined(change):
    weights = frozen(4, 3), frozen(2, 3)
    join_(*weights)
    module = nn.ParameterList(weights)
    if change == "to":
        module.to(torch.float32)
    else:
        weights[1].data = weights[1].data.clone()
    assert joined(*module) is None
    values = torch.cat(list(module))
    module[0].data = module[0].data.clone()  # out of the storage that was shared
    join_(*module)
    assert torch.equal(joined(*module), values)


def test_neighbours_in_other_storages_and_gaps_are_not_joined():
    whole = torch.randn(7, 3)
    assert joined(whole[:4], whole[4:]) is not None
    assert joined(whole[:4], whole[5:]) is None
    assert joined(whole[:, :2], whole[:, :2]) is None
    assert joined(whole[:4], whole.clone()[4:]) is None
    assert joined(whole[:4], whole[4:].to(torch.float64)) is None
    assert joined(torch.empty(4, 3, device="meta"), torch.empty(4, 3, device="meta")) is None


def test_saved_for_backward_before_and_used_after():
    """As when a module that was moved is joined anew: autograd meets the same values."""
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weights = frozen(4, 6), frozen(2, 6)
    loss = sum(F.linear(x, weight).square().sum() for weight in weights)
    (want,) = torch.autograd.grad(loss, x, retain_graph=True)
    with torch.inference_mode():
        join_(*weights)
    loss.backward()
    assert torch.equal(x.grad, want)
    assert not weights[0].is_inference()


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([frozen(4, 3), torch.zeros(2, 3)], TypeError, "plain floating Parameters, got a Tensor"),
        (
            [frozen(4, 3), nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), False)],
            TypeError,
            "got a Parameter of torch.int8",
        ),
        ([frozen(4, 3), frozen(2, 3, dtype=torch.float32)], TypeError, "share a dtype"),
        ([frozen(4, 3), frozen(2, 4)], ValueError, "one in_features"),
        ([frozen(4), frozen(2)], ValueError, "matrices"),
        ([frozen(4, 3), frozen(2, 3, device="meta")], ValueError, "not meta"),
    ],
)
def test_join_refuses(weights, error, message):
    places = [weight.data_ptr() for weight in weights if not weight.is_meta]
    with pytest.raises(error, match=message):
        join_(*weights)
    assert [weight.data_ptr() for weight in weights if not weight.is_meta] == places


def test_join_refuses_what_shares_its_storage():
    whole = torch.randn(6, 3)
    part, other = nn.Parameter(whole[:4], requires_grad=False), frozen(2, 3, dtype=torch.float32)
    assert not is_alone(part) and is_alone(other)
    with pytest.raises(ValueError, match="a storage each"):
        join_(part, other)


SIZES = (8, 4, 3)


class Projections:
    """K = 6, three layers of it; `together` of them are joined."""

    def __init__(self, together, biases, tokens=(2, 5), dtype=torch.float64, device="cpu"):
        self.x = torch.randn(*tokens, 6, dtype=torch.float64).to(device, dtype).requires_grad_()
        self.weights = [frozen(n, 6, dtype=dtype, device=device) for n in SIZES]
        self.biases = [
            frozen(n, dtype=dtype, device=device) if has else None
            for n, has in zip(SIZES, biases, strict=True)
        ]
        self.dys = [torch.randn(*tokens, n, dtype=torch.float64).to(device, dtype) for n in SIZES]
        if together > 1:
            join_(*self.weights[:together])

    def __call__(self, **kwargs):
        return joined_linear(self.x, self.weights, runs_of(self.weights, self.biases), **kwargs)

    def dense(self, dtype):
        x = self.x.detach().to(dtype).requires_grad_()
        cast = [None if b is None else b.to(dtype) for b in self.biases]
        ys = [F.linear(x, w.to(dtype), b) for w, b in zip(self.weights, cast, strict=True)]
        return ys, torch.autograd.grad(ys, x, [dy.to(dtype) for dy in self.dys])[0]


@pytest.mark.parametrize("biases", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("together", (1, 2, 3))
@pytest.mark.parametrize("apart", (False, True))
def test_joined_linear_equals_linear_layers(apart, together, biases, monkeypatch):
    monkeypatch.setattr(backend, "LAUNCH_BYTES", 0 if apart else backend.LAUNCH_BYTES)
    layers = Projections(together, biases)
    want, want_dx = layers.dense(torch.float64)
    with Products() as forward:
        ys = layers()
    for got, expected in zip(ys, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    if apart:
        assert forward.columns == [8, 4, 3]
    elif len(set(biases)) == 1:
        assert forward.columns == {1: [8, 4, 3], 2: [12, 3], 3: [15]}[together]
    with Products() as backward:
        (dx,) = torch.autograd.grad(ys, layers.x, layers.dys)
    assert backward.columns == [6, 6, 6]
    torch.testing.assert_close(dx, want_dx, rtol=0, atol=1e-12)


def test_one_product_while_a_copy_of_its_outputs_takes_no_longer_than_a_launch():
    """q and k of LLaMA-2-7B in half precision: 8192 rows, 32 KB a token read and written."""
    weight = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")

    def prefers(tokens, dtype=torch.bfloat16):
        x = torch.empty(tokens, 4096, dtype=dtype, device="meta")
        return backend.prefers_joined_outputs(x, weight)

    assert prefers(1) and prefers(512) and prefers(579)
    assert not prefers(580) and not prefers(4096) and not prefers(512, torch.float32)


@pytest.mark.parametrize("apart", (False, True))
@pytest.mark.parametrize("tokens", [(21,), (1,), (0,), (4, 0)])
@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_joined_linear_is_as_accurate_as_eager(impl, tokens, apart, device, dtypes, monkeypatch):
    monkeypatch.setattr(backend, "LAUNCH_BYTES", 0 if apart else backend.LAUNCH_BYTES)
    for dtype in dtypes:
        layers = Projections(2, (True, True, True), tokens, dtype, device)
        exact, exact_dx = layers.dense(torch.float64)
        eager, eager_dx = layers.dense(dtype)
        ys = layers(impl=impl)
        assert all(y.is_contiguous() for y in ys) or not apart
        for results in zip((y.detach() for y in ys), exact, eager, strict=True):
            assert_as_accurate(*results)
        (dx,) = torch.autograd.grad(ys, layers.x, layers.dys)
        assert_as_accurate(dx, exact_dx, eager_dx)


def test_outputs_that_nobody_uses_cost_nothing():
    layers = Projections(2, (True, True, True))
    _, used, _ = layers()
    with Products() as backward:
        (dx,) = torch.autograd.grad(used, layers.x, layers.dys[1])
    assert backward.columns == [6]
    torch.testing.assert_close(dx, layers.dys[1] @ layers.weights[1])
    layers.x = layers.x.detach()
    assert not any(y.requires_grad for y in layers())


def test_it_saves_nothing_and_the_last_one_keeps_only_itself_alive():
    layers = Projections(2, (False, False, False), (4, 8), torch.float32)
    module = nn.Module()
    module.tensors = [layers.x, layers.weights]
    kept = kept_by(lambda: layers()[2], module)
    assert (kept.saved, kept.unseen) == (0, 0)
    query, key, value = layers()
    assert storages([query]) == storages([key])
    assert storages([value]).popitem()[1] == value.numel() * 4


def test_autocast(device):
    layers = Projections(2, (True, True, True), dtype=torch.float32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        ys = layers(impl="torch")
        want = [F.linear(layers.x, *wb) for wb in zip(layers.weights, layers.biases, strict=True)]
    assert [y.dtype for y in ys] == [torch.bfloat16] * 3
    for got, expected in zip(ys, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    (dx,) = torch.autograd.grad(ys, layers.x, [dy.bfloat16() for dy in layers.dys])
    assert dx.dtype == torch.float32
    torch.testing.assert_close(dx, layers.dense(torch.float32)[1], rtol=0.05, atol=0.05)
