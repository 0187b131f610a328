"""s2_mlp: values, gradients, what it saves, counts, and the settings it runs under."""

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_accurate
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from triton.runtime.jit import KernelInterface

from bench.measure.memory import kept_by
from s2kernels.autograd import s2_mlp
from s2kernels.autograd.accumulate import own_gradient
from s2kernels.autograd.joined import join_, joined

MODES = ("inplace", "additive")
TRAINED = [
    names for num in (1, 2, 3) for names in itertools.combinations(("gate", "up", "down"), num)
]
SCATTERED = torch.tensor([8, 0, 5], dtype=torch.int32)


class Ffn:
    """Random operands: K = 6 -> F = 9 -> N = 5 by default."""

    def __init__(
        self, trained, mode, index, tokens=(3, 4), dtype=torch.float64, device="cpu", k=6, f=9, n=5
    ):
        generator = torch.Generator().manual_seed(2)

        def randn(*shape):
            value = torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
            return value.to(device, dtype)

        shapes = {"gate": (f, k), "up": (f, k), "down": (n, f)}
        self.index = index if isinstance(index, slice) else index.to(device)
        self.mode = mode
        num = index.stop - index.start if isinstance(index, slice) else index.numel()
        self.x = randn(*tokens, k).requires_grad_()
        self.original = {name: randn(*shape) for name, shape in shapes.items()}
        self.biases = {name: randn(shape[0]).requires_grad_() for name, shape in shapes.items()}
        self.dy = randn(*tokens, n)
        self.deltas = {}
        for name in trained:
            value = randn(n, num) if name == "down" else randn(num, k)
            self.deltas[name] = value.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        self.weights = dict(self.original)
        if mode == "inplace":
            self.weights = {name: self._with_delta(name, dtype) for name in shapes}

    def joined(self):
        """The same, with gate and up one after the other."""
        pair = [nn.Parameter(self.weights[name], requires_grad=False) for name in ("gate", "up")]
        join_(*pair)
        self.weights |= dict(zip(("gate", "up"), pair, strict=True))
        return self

    def _where(self, name):
        index = self.index if isinstance(self.index, slice) else self.index.long()
        return (slice(None), index) if name == "down" else (index,)

    def _with_delta(self, name, dtype):
        weight = self.original[name].to(dtype).clone()
        if name in self.deltas:
            weight[self._where(name)] += self.deltas[name].detach().to(dtype)
        return weight

    def __call__(self, x=None, *deltas, **kwargs):
        deltas = dict(zip(self.deltas, deltas, strict=True)) if deltas else self.deltas
        return s2_mlp(
            self.x if x is None else x,
            *self.weights.values(),
            self.index,
            **{f"{name}_delta": delta for name, delta in deltas.items()},
            **{f"{name}_bias": bias for name, bias in self.biases.items()},
            mode=self.mode,
            **kwargs,
        )

    def dense(self, dtype=None):
        """y and all gradients, in the order of `gradients`, by dense autograd."""
        dtype = dtype or self.x.dtype
        x = self.x.detach().to(dtype).requires_grad_()
        weights = {name: self._with_delta(name, dtype).requires_grad_() for name in self.original}
        if self.mode == "inplace":  # rounded once to the dtype of the weight, as it is stored
            weights = {
                name: weight.detach().to(dtype).requires_grad_()
                for name, weight in self.weights.items()
            }
        biases = {n: b.detach().to(dtype).requires_grad_() for n, b in self.biases.items()}
        gate = F.linear(x, weights["gate"], biases["gate"])
        up = F.linear(x, weights["up"], biases["up"])
        y = F.linear(F.silu(gate) * up, weights["down"], biases["down"])
        y.backward(self.dy.to(dtype))
        d_deltas = [weights[name].grad[self._where(name)] for name in self.deltas]
        return [y.detach(), x.grad, *d_deltas, *(b.grad for b in biases.values())]

    def gradients(self):
        trained = [self.x, *self.deltas.values(), *self.biases.values()]
        return [value.grad for value in trained]

    def held(self):
        module = nn.Module()
        module.tensors = [self.x, self.index, self.weights, self.deltas, self.biases]
        return module


@pytest.mark.parametrize("together", (False, True), ids=("apart", "joined"))
@pytest.mark.parametrize("index", (slice(2, 5), SCATTERED), ids=("run", "scattered"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
def test_s2_mlp_equals_dense_autograd_on_the_slices(trained, mode, index, together):
    ffn = Ffn(trained, mode, index)
    exact = ffn.dense()
    ffn = ffn.joined() if together else ffn
    y = ffn()
    y.backward(ffn.dy)
    for got, want in zip([y, *ffn.gradients()], exact, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [(), (5,), (3, 4)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_what_comes_out_may_be_written_to(mode, tokens):
    ffn = Ffn(("up", "down"), mode, SCATTERED, tokens)
    exact = ffn.dense()
    y = ffn()
    y.mul_(2)
    y.backward(ffn.dy / 2)
    for got, want in zip([y / 2, *ffn.gradients()], exact, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
def test_s2_mlp_gradcheck(trained):
    """In additive mode y is a function of the deltas; inplace it is one of the weights."""
    ffn = Ffn(trained, "additive", SCATTERED)
    assert torch.autograd.gradcheck(ffn, (ffn.x, *ffn.deltas.values()))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [(21,), (2, 9), (1,), (0,), (4, 0)])
@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("mode", MODES)
def test_s2_mlp_is_as_accurate_as_eager(mode, impl, tokens, device, dtypes):
    for dtype in dtypes:
        for index in (slice(3, 17), torch.tensor([31, 2, 16, 5], dtype=torch.int32)):
            ffn = Ffn(("gate", "up", "down"), mode, index, tokens, dtype, device, k=50, f=33, n=19)
            exact, eager = ffn.dense(torch.float64), ffn.dense()
            y = ffn.joined()(impl=impl)
            y.backward(ffn.dy)
            for got, want, peer in zip([y.detach(), *ffn.gradients()], exact, eager, strict=True):
                assert_as_accurate(got, want, peer.to(got.dtype))


@pytest.mark.parametrize("together", (False, True), ids=("apart", "joined"))
@pytest.mark.parametrize("mode", MODES)
def test_s2_mlp_saves_gate_and_up_alone(mode, together):
    for trained, index, num in ((("down",), slice(2, 5), 0), (("up", "down"), SCATTERED, 6)):
        ffn = Ffn(trained, mode, index, (4, 8), torch.float32)
        ffn = ffn.joined() if together else ffn
        kept = kept_by(lambda ffn=ffn: ffn(ffn.x * 1), ffn.held())
        assert (kept.saved, kept.unseen) == (32 * (2 * 9 + num) * 4, 0)


class _Operators(TorchDispatchMode):
    """The operators that compute something: neither views nor allocations."""

    FREE = {"view", "_unsafe_view", "as_strided", "t", "transpose", "split", "slice", "detach"}
    FREE |= {"empty", "empty_like", "new_empty", "_reshape_alias"}

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _unbiased(together):
    ffn = Ffn(("down",), "inplace", slice(2, 5), (4, 8), torch.float32)
    ffn.biases = {}
    return ffn.joined() if together else ffn


def test_operators_of_a_step():
    """Counted without a GPU: what eager torch would do, and ours beside it."""
    for together in (False, True):
        ffn = _unbiased(together)
        with _Operators() as forward:
            y = ffn()
        assert forward.names == ["mm"] * (2 - together) + ["silu", "mul_"] + ["mm"]
        with _Operators() as backward:
            torch.autograd.grad(y, [ffn.x, ffn.deltas["down"]], ffn.dy)
        dh = ["mm"]
        # among them the trained channels of h are rebuilt
        swiglu_bwd = ["mul", "narrow_copy", "silu", "narrow_copy", "mul_", "mul_", "silu_backward"]
        d_down = ["mm", "clone"]
        dx = ["mm"] if together else ["mm", "addmm_"]
        assert backward.names == dh + swiglu_bwd + d_down + dx


def test_launches_of_a_step(device, monkeypatch):
    """The kernels that a step launches, the dense GEMMs among them as impl="triton" has it."""
    launched = []
    original = KernelInterface.__getitem__

    def launch(kernel, grid):
        launched.append("gemm" if kernel.__name__.startswith("_linear") else kernel.__name__)
        return original(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", launch)
    for index in (slice(2, 5), SCATTERED):
        ffn = Ffn(("down",), "inplace", index, (4, 8), torch.float32, device).joined()
        ffn.biases = {}
        y = ffn(impl="triton")
        assert launched == ["gemm", "_swiglu_kernel", "gemm"]
        launched.clear()
        torch.autograd.grad(y, [ffn.x, ffn.deltas["down"]], ffn.dy)
        h_slice = [] if isinstance(index, slice) else ["_swiglu_kernel"]
        want = ["gemm", *h_slice, "_swiglu_bwd_kernel", "_slice_grad_kernel", "gemm"]
        assert launched == want
        launched.clear()


@pytest.mark.parametrize("together", (False, True), ids=("apart", "joined"))
@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_the_backward_writes_over_gate_and_up(impl, together, device):
    """Unless the graph is kept: then a second backward gives the same, and after it none."""
    ffn = Ffn(("gate", "up", "down"), "inplace", SCATTERED, (4, 8), torch.float32, device)
    ffn = ffn.joined() if together else ffn
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ffn(impl=impl)
    widths = (18,) if together else (9, 9)
    kept = [t for t in saved if t.dim() == 2 and t.shape in [(32, n) for n in widths]]
    assert len(kept) == len(widths)
    before = [(t.clone(), t._version) for t in kept]
    trained = [ffn.x, *ffn.deltas.values()]

    first = torch.autograd.grad(y, trained, ffn.dy, retain_graph=True)
    for tensor, (value, version) in zip(kept, before, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version
    second = torch.autograd.grad(y, trained, ffn.dy)
    for got, want in zip(second, first, strict=True):
        assert torch.equal(got, want)
    for tensor, (value, version) in zip(kept, before, strict=True):
        assert not torch.equal(tensor, value) and tensor._version > version
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, trained, ffn.dy)


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_a_use_after_the_backward_is_an_error(impl, device):
    """Of a tensor that shares what the backward wrote over: the packed gate and up. Autograd
    sees no kernel write, and is told.
    """
    ffn = Ffn(("down",), "inplace", slice(2, 5), (4, 8), torch.float32, device).joined()
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = ffn(impl=impl)
    (gate_up,) = (tensor for tensor in saved if tensor.shape == (32, 18))
    scale = torch.ones((), device=device, requires_grad=True)
    later = (gate_up * scale).sum()
    y.backward(ffn.dy)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


@pytest.mark.parametrize("mode", MODES)
def test_saved_tensors_that_went_elsewhere(mode):
    """On the CPU: what comes back is a copy, of the weights, too, and these are not joined then."""
    ffn = Ffn(("up", "down"), mode, SCATTERED).joined()
    exact = ffn.dense()
    with save_on_cpu():
        y = ffn()
    y.backward(ffn.dy, retain_graph=True)
    y.backward(ffn.dy)
    for got, want in zip(ffn.gradients(), exact[1:], strict=True):
        torch.testing.assert_close(got, 2 * want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("saving", (nullcontext, save_on_cpu))
def test_gradients_go_where_their_owner_says(saving):
    class Owner:
        steps_in_backward = False

        def __init__(self):
            self.slots = {}

        def take_slot(self, parameter, use):
            parameter.grad = self.slots.setdefault(id(parameter), torch.zeros_like(parameter))
            return parameter.grad

    ffn = Ffn(("gate", "up", "down"), "inplace", SCATTERED).joined()
    exact = ffn.dense()
    owner = Owner()
    for delta in ffn.deltas.values():
        own_gradient(delta, owner)
    for _ in range(2):
        with saving():
            y = ffn()
        y.backward(ffn.dy)
    for got, want in zip(ffn.gradients(), exact[1:], strict=True):
        torch.testing.assert_close(got, 2 * want, rtol=0, atol=1e-12)
    assert all(delta.grad is owner.slots[id(delta)] for delta in ffn.deltas.values())


def test_weights_that_come_apart_between_forward_and_backward():
    ffn = Ffn(("up", "down"), "inplace", SCATTERED).joined()
    exact = ffn.dense()
    y = ffn()
    ffn.weights["up"].data = ffn.weights["up"].data.clone()
    assert joined(ffn.weights["gate"], ffn.weights["up"]) is None
    y.backward(ffn.dy)
    for got, want in zip([y, *ffn.gradients()], exact, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_one_bias_alone():
    ffn = Ffn(("down",), "inplace", slice(2, 5)).joined()
    with torch.no_grad():
        ffn.biases["up"].zero_()
    exact = ffn.dense()
    del ffn.biases["up"]
    y = ffn()
    y.backward(ffn.dy)
    for got, want in zip([y, ffn.x.grad], exact, strict=False):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_what_needs_no_gradient_is_not_computed(mode):
    ffn = Ffn(("down",), mode, slice(2, 5))
    exact = ffn.dense()
    ffn.x = ffn.x.detach()
    for bias in ffn.biases.values():
        bias.requires_grad_(False)
    ffn().backward(ffn.dy)
    assert ffn.gradients()[0] is None
    torch.testing.assert_close(ffn.deltas["down"].grad, exact[2], rtol=0, atol=1e-12)

    ffn = Ffn(("down",), mode, slice(2, 5))
    ffn.deltas["down"].requires_grad_(False)
    ffn().backward(ffn.dy)
    assert ffn.deltas["down"].grad is None
    torch.testing.assert_close(ffn.x.grad, exact[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("together", (False, True), ids=("apart", "joined"))
@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_and_micro_batches(mode, use_reentrant, together):
    ffn = Ffn(("up", "down"), mode, SCATTERED, (6, 4))
    exact = ffn.dense()
    ffn = ffn.joined() if together else ffn
    for part in (slice(0, 1), slice(1, 6)):
        checkpoint(ffn, ffn.x[part], use_reentrant=use_reentrant).backward(ffn.dy[part])
    for got, want in zip(ffn.gradients(), exact[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", (slice(2, 5), SCATTERED), ids=("run", "scattered"))
@pytest.mark.parametrize("mode", MODES)
def test_compile_without_graph_breaks(mode, index):
    torch._dynamo.reset()
    ffn = Ffn(("gate", "up", "down"), mode, index)
    exact = ffn.dense()
    ffn.joined()
    step = torch.compile(lambda x, *deltas: ffn(x, *deltas), fullgraph=True, backend="aot_eager")
    y = step(ffn.x, *ffn.deltas.values())
    y.backward(ffn.dy)
    for got, want in zip([y, *ffn.gradients()], exact, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_computes_in_its_dtype_and_returns_fp32_gradients(mode, device):
    ffn = Ffn(("gate", "up", "down"), mode, slice(2, 5), (4, 6), torch.float32, device)
    exact = ffn.dense(torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        y = ffn(impl="torch")
    assert y.dtype == torch.bfloat16
    y.backward(ffn.dy.bfloat16())
    for got, want in zip([y, *ffn.gradients()], exact, strict=True):
        assert got is y or got.dtype == torch.float32
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 8 * torch.finfo(torch.bfloat16).eps, error


@pytest.mark.parametrize("mode", MODES)
def test_autocast_takes_an_input_that_is_in_its_dtype(mode, device):
    """What another layer has computed; the same as the fp32 numbers, bit for bit."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        ffn = Ffn(("gate", "up", "down"), mode, slice(2, 5), (4, 6), torch.float32, device)
        ffn.x = ffn.x.detach().bfloat16().to(dtype).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            y = ffn(impl="torch")
        y.backward(ffn.dy.bfloat16())
        assert ffn.x.grad.dtype == dtype
        results.append([y, *(grad.float() for grad in ffn.gradients())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(down_delta=None), ValueError, "one of gate_delta, up_delta, down_delta"),
        (dict(down_delta=torch.zeros(5, 2)), ValueError, "delta must have shape"),
        (dict(down_delta=torch.zeros(5, 3, dtype=torch.int8)), TypeError, "delta must be"),
        (dict(up_delta=torch.zeros(5, 3)), ValueError, "delta must have shape"),
        (dict(mode="column"), ValueError, "mode must be one of"),
        (dict(index=SCATTERED + 1), ValueError, r"index must lie in \[0, 9\)"),
        (dict(up_weight=torch.zeros(8, 6)), ValueError, "up_weight must have shape"),
        (dict(down_weight=torch.zeros(5, 8)), ValueError, "down_weight"),
        (dict(gate_weight=torch.zeros(9, 6, dtype=torch.int8)), TypeError, "gate_weight must be"),
        (dict(up_bias=torch.zeros(6)), ValueError, "up_bias must have shape"),
        (dict(x=torch.zeros(2, 5)), ValueError, "x must have shape"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = dict(
        x=torch.zeros(2, 6),
        gate_weight=torch.zeros(9, 6),
        up_weight=torch.zeros(9, 6),
        down_weight=torch.zeros(5, 9),
        index=SCATTERED,
        down_delta=torch.zeros(5, 3),
    )
    with pytest.raises(error, match=message):
        s2_mlp(**arguments | change)
