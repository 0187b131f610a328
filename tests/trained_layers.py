"""Layers that train a slice or entries of their weight, beside what dense autograd makes of it."""

from contextlib import contextmanager

import torch
from numerics import assert_as_accurate
from torch import nn

from bench.measure.memory import Kept, kept_by
from s2kernels.autograd import s2_linear, sparse_linear
from s2kernels.autograd.first_order import apply
from s2kernels.autograd.linear import S2LinearFunction, operands
from s2kernels.autograd.panels import Panels
from s2kernels.autograd.sparse import linear as sparse
from s2kernels.plan import tile_plan
from s2kernels.reference import slice_write, sparse_write

INDICES = {
    "run": slice(2, 5),
    "scattered": torch.tensor([6, 0, 3], dtype=torch.int32),
    "one": torch.tensor([4], dtype=torch.int32),
    "all": torch.arange(7, dtype=torch.int32),
}
COUNTS = {"one": 1, "some": 9, "all": 49}


class Layer:
    """Random operands of one layer, N = out_features, K = in_features.

    where   indexes what is trained of a matrix (N, K), see the classes
    base    that of the weight, in mode "inplace"; else None
    """

    def __init__(self, mode, tokens, dtype, device, n, k):
        generator = torch.Generator().manual_seed(1)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.mode = mode
        self.x = randn(*tokens, k).to(device, dtype).requires_grad_()
        self.weight = randn(n, k).to(device, dtype)
        self.bias = randn(n).to(device, dtype).requires_grad_()
        self.dy = randn(*tokens, n).to(device, dtype)
        self.original, trained = self.weight.clone(), self.weight[self.where].clone()
        self.base = trained if mode == "inplace" else None
        self.delta = randn(*trained.shape).to(device, torch.promote_types(dtype, torch.float32))
        self.delta.requires_grad_()

    def __call__(self, x=None, delta=None, bias=None, **kwargs):
        given = zip((x, delta, bias), (self.x, self.delta, self.bias), strict=True)
        x, delta, bias = (own if other is None else other for other, own in given)
        self.write(delta)
        return self.run(x, delta, bias, **kwargs)

    def write(self, delta):
        """What the caller does in place: what is trained is in the weight."""
        if self.base is not None:
            self.write_into_weight(delta)

    def held(self):
        """What the host calls, with a context that writes again for the backward."""
        self.write(self.delta)
        return self.run_held(self._writing())

    @contextmanager
    def _writing(self):
        self.write(self.delta)
        yield

    def dense(self, dtype=None):
        """y, dx, d_delta, d_bias by dense autograd: the whole dW, of which a part is taken."""
        dtype = dtype or self.x.dtype
        x, bias = (t.detach().to(dtype).requires_grad_() for t in (self.x, self.bias))
        trained = self.original.to(dtype).clone()
        trained[self.where] += self.delta.detach().to(dtype)
        trained.requires_grad_()
        y = nn.functional.linear(x, trained, bias)
        y.backward(self.dy.to(dtype))
        return y.detach(), x.grad, trained.grad[self.where], bias.grad

    def gradients(self):
        return self.x.grad, self.delta.grad, self.bias.grad

    def kept(self, needs_dx=True) -> Kept:
        """What a forward keeps: x * 1 is an activation that nothing but the op could keep alive."""
        held = nn.Module()
        held.tensors = list(vars(self).values())
        x = self.x.detach().requires_grad_(needs_dx)
        return kept_by(lambda: self(x * 1), held)


class SliceLayer(Layer):
    """By s2_linear: channels `index`, a slice or an int32 tensor, of dimension `dim`."""

    def __init__(
        self, dim, mode, index, tokens=(3, 5), dtype=torch.float64, device="cpu", n=7, k=7
    ):
        self.dim = dim
        self.index = index if isinstance(index, slice) else index.to(device)
        super().__init__(mode, tokens, dtype, device, n, k)

    @property
    def where(self):
        channels = self.index if isinstance(self.index, slice) else self.index.long()
        return (slice(None), channels) if self.dim == "in" else (channels,)

    def run(self, x, delta, bias, **kwargs):
        return s2_linear(
            x, self.weight, delta, self.index, dim=self.dim, bias=bias, mode=self.mode, **kwargs
        )

    def run_held(self, holding):
        layer = (self.weight, self.delta, self.index, self.dim, self.bias, self.mode)
        return apply(S2LinearFunction, self.x, *operands(*layer, holding))

    def write_into_weight(self, delta):
        slice_write([self.weight], [self.base], [delta], [self.index], [self.dim])

    def restore(self):
        slice_write([self.weight], [self.base], [None], [self.index], [self.dim])


class SparseLayer(Layer):
    """By sparse_linear: `num` entries at random places.

    mode "panels": additive over a weight whose rows are made, as those of a quantized base are.
    """

    def __init__(self, mode, num, tokens=(3, 5), dtype=torch.float64, device="cpu", n=7, k=7):
        drawn = torch.randperm(n * k, generator=torch.Generator().manual_seed(2))[:num]
        self.index = drawn.sort().values.int().to(device)
        self.plan, self.calls = tile_plan(self.index, (n, k)), 0
        super().__init__(mode, tokens, dtype, device, n, k)

    @property
    def where(self):
        index, k = self.index.long(), self.weight.shape[1]
        return index // k, index % k

    def rows(self, start, stop):
        self.calls += 1
        return self.original[start:stop].clone()

    def run(self, x, delta, bias, **kwargs):
        in_panels = self.mode == "panels"
        weight = Panels(self.weight.shape, self.rows) if in_panels else self.weight
        mode = "additive" if in_panels else self.mode
        return sparse_linear(
            x, weight, delta, self.index, bias, plan=self.plan, mode=mode, **kwargs
        )

    def run_held(self, holding):
        arguments = (self.x, self.weight, self.delta, self.index, self.bias, self.mode, self.plan)
        return sparse(*arguments, holding=holding)

    def write_into_weight(self, delta):
        sparse_write([self.weight], [self.base], [delta], [self.index])

    def restore(self):
        sparse_write([self.weight], [self.base], None, [self.index])


def assert_close(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def assert_as_accurate_as_dense(layer, impl):
    """Outputs and gradients, by the tolerance rule, beside dense autograd in fp64 and eagerly."""
    y = layer(impl=impl)
    y.backward(layer.dy)
    actual = (y.detach(), *layer.gradients())
    exact, eager = layer.dense(torch.float64), layer.dense()
    for got, want, peer in zip(actual, exact, eager, strict=True):
        assert_as_accurate(got, want, peer.to(got.dtype))
