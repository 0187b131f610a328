"""s2_linear and s2_delta, beside what test_autograd_layers.py says of the first."""

import pytest
import torch
from numerics import assert_as_accurate
from torch import nn
from torch.profiler import ProfilerActivity, profile
from trained_layers import INDICES
from trained_layers import SliceLayer as Layer

from s2kernels import backend
from s2kernels.autograd import s2_delta, s2_linear
from s2kernels.kernels import fused_linear, target

MODES = ("inplace", "additive")
IMPLS = ("torch", "triton")


@pytest.mark.parametrize("index", (slice(8, 24), slice(9, 18)), ids=("aligned", "odd"))
@pytest.mark.parametrize("dim", ("in", "out"))
def test_additive_in_one_launch_where_that_is_faster(dim, index, monkeypatch, device):
    """The same values and gradients as by two. What copy engines cannot load takes two, too."""
    monkeypatch.setattr(backend, "select", lambda x, impl=None: backend._eager())
    name = "linear_plus_slice" if dim == "in" else "linear_dx_plus_slice"
    launch, launches = fused_linear.launch_descriptors, []

    def counted(op, *args, **kwargs):
        launches.append(op)
        return launch(op, *args, **kwargs)

    monkeypatch.setattr(fused_linear, "launch_descriptors", counted)
    results = []
    for ranges in ((), ((1, 4), (8, 64))):
        table = {(target.chip(device).name, name, "float16"): {(40, 48): ranges}}
        monkeypatch.setattr(target, "FASTER", table)
        layer = Layer(dim, "additive", index, (24,), torch.float16, device, n=40, k=48)
        y = layer()
        y.backward(layer.dy)
        results.append([y.detach(), layer.x.grad, layer.delta.grad, layer.bias.grad])
    aligned = index.start % 8 == 0 and target.has_descriptors(device)
    assert launches == ([name] if aligned else [])
    exact, eager = layer.dense(torch.float64), layer.dense()
    for two, one, want, peer in zip(*results, exact, eager, strict=True):
        assert_as_accurate(two, want, peer.to(two.dtype))
        assert_as_accurate(one, want, peer.to(one.dtype))


@pytest.mark.parametrize("index", (torch.tensor([1, 5, 6], dtype=torch.int32), slice(2, 5)))
@pytest.mark.parametrize("mode", MODES)
def test_s2_linear_saves_a_copy_of_the_slice_and_no_other_activation(mode, index):
    kept = Layer("in", mode, index, (4, 8), torch.float32).kept()
    assert (kept.saved, kept.unseen) == (32 * 3 * 4, 0)


def test_out_slice_saves_its_input_alone():
    kept = Layer("out", "additive", slice(2, 5), (4, 8), torch.float32).kept()
    assert (kept.saved, kept.unseen) == (32 * 7 * 4, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("run", "scattered"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", ("in", "out"))
def test_compile_without_graph_breaks(dim, mode, name):
    torch._dynamo.reset()
    layer = Layer(dim, mode, INDICES[name])
    exact = layer.dense()
    step = torch.compile(lambda x, delta: layer(x, delta) * 1, fullgraph=True, backend="aot_eager")
    y = step(layer.x, layer.delta)
    y.backward(layer.dy)
    for got, want in zip((y, layer.x.grad, layer.delta.grad), exact[:3], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", ("in", "out"))
def test_layers_follow_one_another_under_autocast(dim, mode, device):
    """The second is given what the first returns, in the dtype of autocast; its weight is fp32.
    The same as what the fp32 numbers in between give, bit for bit.
    """
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        first, second = (Layer(dim, mode, slice(2, 5), (4, 6), torch.float32, device) for _ in "12")
        with torch.autocast(device.type, torch.bfloat16):
            y = second(first(impl="torch").to(dtype), impl="torch")
        y.backward(second.dy.bfloat16())
        results.append([y, first.x.grad, first.delta.grad, second.delta.grad, second.bias.grad])
        assert {grad.dtype for grad in results[-1][1:]} == {torch.float32}
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", ("in", "out"))
def test_on_the_meta_device(dim, mode):
    """Shapes and dtypes alone; there is no autocast."""
    layer = Layer(dim, mode, INDICES["scattered"], dtype=torch.float16, device="meta")
    y = s2_delta(layer(), layer.x, layer.delta, layer.index, dim=dim)
    y.backward(layer.dy)
    assert (y.shape, y.dtype, y.device.type) == ((3, 5, 7), torch.float16, "meta")
    for leaf in (layer.x, layer.delta, layer.bias):
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("dim", ("in", "out"))
def test_s2_delta_gradcheck(dim, name):
    layer = Layer(dim, "additive", INDICES[name])
    y = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    inputs = (y, layer.x, layer.delta)
    assert torch.autograd.gradcheck(
        lambda y, x, delta: s2_delta(y, x, delta, layer.index, dim=dim), inputs
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", ("in", "out"))
def test_s2_delta_on_any_base_equals_the_fused_layer(dim, impl, device):
    layer = Layer(dim, "additive", INDICES["scattered"], dtype=torch.float32, device=device)
    exact, eager = layer.dense(torch.float64), layer.dense()
    base = nn.functional.linear(layer.x, layer.weight, layer.bias)
    before = base.detach().clone()
    y = s2_delta(base, layer.x, layer.delta, layer.index, dim=dim, impl=impl)
    y.backward(layer.dy)
    assert torch.equal(base.detach(), before)
    got = (y.detach(), layer.x.grad, layer.delta.grad, layer.bias.grad)
    for value, want, peer in zip(got, exact, eager, strict=True):
        assert_as_accurate(value, want, peer)


def test_dx_of_an_out_slice_on_any_base_is_written_once():
    """Zeros to add to would be two passes over it more."""
    layer = Layer("out", "additive", slice(2, 5), dtype=torch.float32)
    base = torch.zeros(3, 5, 7, requires_grad=True)
    y = s2_delta(base, layer.x, layer.delta, layer.index, dim="out")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        y.backward(layer.dy)
    names = {event.key for event in profiled.key_averages()}
    assert not names & {"aten::new_zeros", "aten::zero_", "aten::addmm_"}, names
    torch.testing.assert_close(layer.x.grad, layer.dy[..., 2:5] @ layer.delta.detach())


def _refused():
    layer = Layer("in", "inplace", slice(2, 5), dtype=torch.float32)
    index = torch.tensor([2, 3, 4], dtype=torch.int32)
    good = dict(
        x=layer.x,
        weight=layer.weight,
        delta=layer.delta,
        index=index,
        dim="in",
        bias=layer.bias,
    )
    meta = torch.device("meta")
    cases = {
        "index out of range": (dict(index=index + 3), ValueError, "index must lie in"),
        "index negative": (dict(index=index - 3), ValueError, "index must lie in"),
        "index repeated": (dict(index=index.new_tensor([1, 1, 2])), ValueError, "repeat"),
        "index strided": (
            dict(index=index.repeat_interleave(2)[::2]),
            ValueError,
            "index must be contiguous",
        ),
        "index empty": (dict(index=index[:0]), ValueError, "non-empty"),
        "index int64": (dict(index=index.long()), TypeError, "torch.int32"),
        "index list": (dict(index=[1, 2, 3]), TypeError, "int32 tensor or a slice"),
        "index of two dimensions": (dict(index=index[None]), ValueError, "one dimension"),
        "run out of range": (dict(index=slice(5, 8)), ValueError, "inside"),
        "run empty": (dict(index=slice(3, 3)), ValueError, "non-empty"),
        "run with a step": (dict(index=slice(0, 6, 2)), TypeError, "slice"),
        "dim": (dict(dim="column"), ValueError, "dim must be one of"),
        "mode": (dict(mode="fast"), ValueError, "mode must be one of"),
        "impl": (dict(impl="cuda"), ValueError, "impl must be"),
        "delta of another shape": (dict(delta=layer.delta[:, :2]), ValueError, "delta must have"),
        "delta of the other dim": (dict(dim="out"), ValueError, "delta must have shape"),
        "delta integer": (dict(delta=torch.zeros(7, 3, dtype=torch.int32)), TypeError, "delta"),
        "weight integer": (dict(weight=layer.weight.to(torch.int8)), TypeError, "weight must be"),
        "weight elsewhere": (dict(weight=layer.weight.to(meta)), ValueError, "weight must be on"),
        "weight of another dtype": (dict(weight=layer.weight.half()), TypeError, "dtype of x"),
        "weight of another rank": (dict(weight=layer.weight[None]), ValueError, "matrix"),
        "weight trained": (
            dict(weight=layer.weight.clone().requires_grad_()),
            ValueError,
            "frozen",
        ),
        "x integer": (dict(x=torch.zeros(2, 7, dtype=torch.int64)), TypeError, "x must be"),
        "x too narrow": (dict(x=layer.x[..., :6]), ValueError, "x must have shape"),
        "bias of another shape": (dict(bias=layer.bias[:6]), ValueError, "bias must have shape"),
    }
    return good, cases


GOOD, REFUSED = _refused()


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(case):
    change, error, message = REFUSED[case]
    arguments = GOOD | change
    weight = GOOD["weight"].clone()
    x, weight_arg, delta, index = (arguments.pop(n) for n in ("x", "weight", "delta", "index"))
    with pytest.raises(error, match=message):
        s2_linear(x, weight_arg, delta, index, **arguments)
    assert torch.equal(GOOD["weight"], weight)


def test_weight_that_autocast_leaves_in_another_dtype_is_refused(device):
    """As torch.nn.Linear refuses it: fp64 is not cast."""
    single = Layer("in", "additive", slice(2, 5), dtype=torch.float32, device=device)
    double = Layer("in", "additive", slice(2, 5), device=device)
    single.weight, double.weight = double.weight, single.weight
    for layer in (single, double):
        with torch.autocast(device.type, torch.bfloat16), pytest.raises(TypeError, match="of x"):
            layer(impl="torch")


def test_index_is_looked_at_again_after_it_changed():
    index = torch.tensor([2, 3, 4], dtype=torch.int32)
    layer = Layer("in", "additive", index, dtype=torch.float32)
    layer()
    layer.index[0] = 9
    with pytest.raises(ValueError, match="index must lie in"):
        layer()
