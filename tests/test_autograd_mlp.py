"""s2_mlp: values, gradients, what it saves, and the settings it runs under."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_accurate
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.memory import kept_by
from s2kernels.autograd import s2_mlp

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


@pytest.mark.parametrize("index", (slice(2, 5), SCATTERED), ids=("run", "scattered"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
def test_s2_mlp_equals_dense_autograd_on_the_slices(trained, mode, index):
    ffn = Ffn(trained, mode, index)
    exact = ffn.dense()
    y = ffn()
    y.backward(ffn.dy)
    for got, want in zip([y, *ffn.gradients()], exact, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
def test_s2_mlp_gradcheck(trained):
    """In additive mode y is a function of the deltas; inplace it is one of the weights."""
    ffn = Ffn(trained, "additive", SCATTERED)
    assert torch.autograd.gradcheck(ffn, (ffn.x, *ffn.deltas.values()))


@pytest.mark.parametrize("tokens", [(21,), (2, 9), (1,), (0,), (4, 0)])
@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("mode", MODES)
def test_s2_mlp_is_as_accurate_as_eager(mode, impl, tokens, device, dtypes):
    for dtype in dtypes:
        for index in (slice(3, 17), torch.tensor([31, 2, 16, 5], dtype=torch.int32)):
            ffn = Ffn(("gate", "up", "down"), mode, index, tokens, dtype, device, k=50, f=33, n=19)
            exact, eager = ffn.dense(torch.float64), ffn.dense()
            y = ffn(impl=impl)
            y.backward(ffn.dy)
            for got, want, peer in zip([y.detach(), *ffn.gradients()], exact, eager, strict=True):
                assert_as_accurate(got, want, peer.to(got.dtype))


@pytest.mark.parametrize("mode", MODES)
def test_s2_mlp_saves_gate_and_up_alone(mode):
    ffn = Ffn(("down",), mode, slice(2, 5), (4, 8), torch.float32)
    kept = kept_by(lambda: ffn(ffn.x * 1), ffn.held())
    assert (kept.saved, kept.unseen) == (2 * 32 * 9 * 4, 0)

    ffn = Ffn(("up", "down"), mode, SCATTERED, (4, 8), torch.float32)
    kept = kept_by(lambda: ffn(ffn.x * 1), ffn.held())
    assert (kept.saved, kept.unseen) == (2 * 32 * 9 * 4 + 32 * 6 * 4, 0)


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


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_and_micro_batches(mode, use_reentrant):
    ffn = Ffn(("up", "down"), mode, SCATTERED, (6, 4))
    exact = ffn.dense()
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
