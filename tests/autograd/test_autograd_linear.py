"""s2_linear and s2_delta: values, gradients, what they save, and the settings they run under."""

from contextlib import contextmanager

import pytest
import torch
from numerics import assert_as_accurate
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from bench.measure.memory import kept_by
from s2kernels import backend
from s2kernels.autograd import s2_delta, s2_linear
from s2kernels.autograd.linear import linear
from s2kernels.kernels import fused_linear, target
from s2kernels.reference import slice_write

MODES = ("inplace", "additive")
IMPLS = ("torch", "triton")
INDICES = {
    "run": slice(2, 5),
    "scattered": torch.tensor([6, 0, 3], dtype=torch.int32),
    "one": torch.tensor([4], dtype=torch.int32),
    "all": torch.arange(7, dtype=torch.int32),
}


class Layer:
    """Random operands of one layer, N = out_features, K = in_features."""

    def __init__(
        self, dim, mode, index, tokens=(3, 5), dtype=torch.float64, device="cpu", n=7, k=7
    ):
        generator = torch.Generator().manual_seed(1)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        num = index.stop - index.start if isinstance(index, slice) else index.numel()
        self.dim, self.mode = dim, mode
        self.index = index if isinstance(index, slice) else index.to(device)
        self.x = randn(*tokens, k).to(device, dtype).requires_grad_()
        self.weight = randn(n, k).to(device, dtype)
        self.bias = randn(n).to(device, dtype).requires_grad_()
        delta_dtype = torch.promote_types(dtype, torch.float32)
        self.delta = (randn(n, num) if dim == "in" else randn(num, k)).to(device, delta_dtype)
        self.delta.requires_grad_()
        self.dy = randn(*tokens, n).to(device, dtype)
        where = (slice(None), index) if dim == "in" else (index,)
        self.base_slice = self.weight[where].clone() if mode == "inplace" else None
        self.original = self.weight.clone()

    def __call__(self, x=None, delta=None, bias=None, **kwargs):
        delta = self.delta if delta is None else delta
        self.write(delta)
        return s2_linear(
            self.x if x is None else x,
            self.weight,
            delta,
            self.index,
            dim=self.dim,
            bias=self.bias if bias is None else bias,
            mode=self.mode,
            **kwargs,
        )

    def write(self, delta=None):
        """What the caller does in place: the slice is in the weight."""
        if self.base_slice is not None:
            delta = self.delta if delta is None else delta
            slice_write([self.weight], [self.base_slice], [delta], [self.index], [self.dim])

    @contextmanager
    def writing(self):
        self.write()
        yield

    def held(self):
        """What the host calls, with a context that writes the slice again for the backward."""
        self.write()
        arguments = (self.x, self.weight, self.delta, self.index, self.dim, self.bias, self.mode)
        return linear(*arguments, holding=self.writing())

    def dense(self, dtype=None):
        """y, dx, d_delta, d_bias by dense autograd: the whole dW, of which the slice is taken."""
        dtype = dtype or self.x.dtype
        x, bias = (t.detach().to(dtype).requires_grad_() for t in (self.x, self.bias))
        weight, delta = self.original.to(dtype), self.delta.detach().to(dtype)
        index = self.index if isinstance(self.index, slice) else self.index.long()
        where = (slice(None), index) if self.dim == "in" else (index,)
        trained = weight.clone()
        trained[where] += delta
        trained.requires_grad_()
        y = nn.functional.linear(x, trained, bias)
        y.backward(self.dy.to(dtype))
        return y.detach(), x.grad, trained.grad[where], bias.grad


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", ("in", "out"))
def test_s2_linear_gradcheck(dim, mode, name):
    layer = Layer(dim, mode, INDICES[name])
    inputs = (layer.x, layer.delta, layer.bias)
    assert torch.autograd.gradcheck(lambda x, d, b: layer(x, d, b), inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [(37,), (2, 9), (1,), (0,), (4, 0)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", ("in", "out"))
def test_s2_linear_equals_dense_autograd_on_the_slice(dim, mode, tokens, impl, device, dtypes):
    for dtype in dtypes:
        for index in (slice(3, 17), torch.tensor([31, 2, 16, 5], dtype=torch.int32)):
            layer = Layer(dim, mode, index, tokens, dtype, device, n=33, k=50)
            y = layer(impl=impl)
            y.backward(layer.dy)
            actual = (y.detach(), layer.x.grad, layer.delta.grad, layer.bias.grad)
            exact, eager = layer.dense(torch.float64), layer.dense()
            for got, want, peer in zip(actual, exact, eager, strict=True):
                assert_as_accurate(got, want, peer.to(got.dtype))


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", ("in", "out"))
def test_s2_linear_takes_strided_inputs(dim, mode):
    index = slice(1, 4)
    layer = Layer(dim, mode, index, (6, 4))
    exact = layer.dense()
    wide = torch.zeros(6, 8, 7, dtype=torch.float64)
    wide[:, ::2] = layer.x.detach()
    layer.x = wide[:, ::2].requires_grad_()
    layer.weight = layer.weight.t().contiguous().t()
    layer.dy = layer.dy.transpose(0, 1).contiguous().transpose(0, 1)
    y = layer()
    y.backward(layer.dy)
    for got, want in zip((y, layer.x.grad, layer.delta.grad, layer.bias.grad), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", ("in", "out"))
def test_inplace_leaves_every_other_entry_alone(dim):
    layer = Layer(dim, "inplace", INDICES["scattered"])
    version = layer.weight._version
    layer().sum().backward()
    where = (slice(None), layer.index.long()) if dim == "in" else (layer.index.long(),)
    changed = torch.zeros_like(layer.weight, dtype=torch.bool)
    changed[where] = True
    assert torch.equal(layer.weight[~changed], layer.original[~changed])
    assert torch.equal(layer.weight[where], layer.base_slice + layer.delta.detach())
    assert layer.weight._version == version
    slice_write([layer.weight], [layer.base_slice], [None], [layer.index], [dim])
    assert torch.equal(layer.weight, layer.original)


@pytest.mark.parametrize("mode", MODES)
def test_s2_linear_saves_a_copy_of_the_slice_and_no_other_activation(mode):
    index = torch.tensor([1, 5, 6], dtype=torch.int32)
    layer = Layer("in", mode, index, (4, 8), torch.float32)
    model = nn.ParameterList([layer.weight, layer.delta, layer.bias]).requires_grad_(False)
    layer.weight, layer.bias = model[0], model[2]
    layer.delta = model[1].requires_grad_()
    held = nn.Module()
    held.tensors = [layer.weight, layer.delta, layer.bias, layer.index, layer.x]
    for index in (layer.index, slice(2, 5)):
        layer.index = index

        # x * 1 is an activation that nothing but s2_linear could keep alive
        kept = kept_by(lambda: layer(layer.x.detach().requires_grad_() * 1), held)
        assert (kept.saved, kept.unseen) == (32 * 3 * 4, 0)


def test_out_slice_saves_its_input_alone():
    layer = Layer("out", "additive", slice(2, 5), (4, 8), torch.float32)
    held = nn.Module()
    held.tensors = [layer.weight, layer.delta, layer.bias, layer.x]
    kept = kept_by(lambda: layer(layer.x.detach().requires_grad_() * 1), held)
    assert (kept.saved, kept.unseen) == (32 * 7 * 4, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", ("in", "out"))
def test_what_needs_no_gradient_is_neither_saved_nor_computed(dim, mode):
    layer = Layer(dim, mode, slice(2, 5))
    exact = layer.dense()
    held = nn.Module()
    held.tensors = [layer.weight, layer.delta, layer.bias, layer.x]

    layer.delta.requires_grad_(False)
    kept = kept_by(lambda: layer(layer.x * 1), held)
    assert kept.saved == 0
    layer().backward(layer.dy)
    assert layer.delta.grad is None
    torch.testing.assert_close(layer.x.grad, exact[1], rtol=0, atol=1e-12)

    layer.delta.requires_grad_()
    layer.x = layer.x.detach()
    layer().backward(layer.dy)
    assert layer.x.grad is None
    torch.testing.assert_close(layer.delta.grad, exact[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", ("in", "out"))
def test_gradients_accumulate_over_micro_batches(dim, mode):
    layer = Layer(dim, mode, INDICES["scattered"], (6, 4))
    exact = layer.dense()
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        layer(layer.x[part]).backward(layer.dy[part])
    torch.testing.assert_close(layer.delta.grad, exact[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.x.grad, exact[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", ("in", "out"))
def test_checkpointing_trains_the_slice(dim, mode, use_reentrant):
    layer = Layer(dim, mode, slice(2, 5))
    exact = layer.dense()
    y = checkpoint(layer, layer.x, use_reentrant=use_reentrant)
    y.backward(layer.dy)
    torch.testing.assert_close(layer.delta.grad, exact[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.x.grad, exact[1], rtol=0, atol=1e-12)


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
def test_autocast_computes_in_its_dtype_and_returns_fp32_gradients(dim, mode, device):
    layer = Layer(dim, mode, slice(2, 5), (4, 6), torch.float32, device)
    exact = layer.dense(torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(impl="torch")
    assert y.dtype == torch.bfloat16
    y.backward(layer.dy.bfloat16())
    assert {layer.x.grad.dtype, layer.delta.grad.dtype, layer.bias.grad.dtype} == {torch.float32}
    for got, want in zip((y, layer.x.grad, layer.delta.grad, layer.bias.grad), exact, strict=True):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 4 * torch.finfo(torch.bfloat16).eps, error


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


def test_two_deltas_take_turns_in_one_weight():
    first = Layer("in", "inplace", slice(2, 5))
    second = Layer("in", "inplace", slice(2, 5))
    second.weight = first.weight
    with torch.no_grad():
        second.delta.mul_(-3)
    wanted = first.dense(), second.dense()
    ys = [layer.held() for layer in (first, second)]
    for layer, y, exact in zip((first, second), ys, wanted, strict=True):
        y.backward(layer.dy)
        got = (y, layer.x.grad, layer.delta.grad)
        for value, want in zip(got, exact[:3], strict=True):
            torch.testing.assert_close(value, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_delta_that_changed_before_backward_is_noticed(mode):
    layer = Layer("in", mode, slice(2, 5))
    y = layer()
    with torch.no_grad():
        layer.delta.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(layer.dy)


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
