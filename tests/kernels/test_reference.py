"""The plain-torch ops against autograd on the dense weight, in fp64."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from layouts import make_index

from s2kernels import backend, kernels, reference

M, N, K, R = 7, 6, 5, 3


@pytest.fixture(params=["run", "any"])
def index(request, dim):
    return make_index(request.param, K if dim == "in" else N, R)


def _random(*shape, **options):
    return torch.randn(shape, dtype=torch.float64, **options)


def _cut(weight, index, dim):
    index = index if isinstance(index, slice) else index.long()
    return weight[:, index] if dim == "in" else weight[index]


def _effective(weight, delta, index, dim):
    """weight + scatter(delta, index)."""
    weight = weight.clone()
    channels = index if isinstance(index, slice) else index.long()
    weight[(slice(None), channels) if dim == "in" else channels] += delta
    return weight


def _delta(dim):
    return _random(N, R) if dim == "in" else _random(R, K)


@pytest.mark.parametrize("name", kernels.__all__)
def test_signatures_agree(name):
    ours, theirs = getattr(kernels, name), getattr(reference, name)
    assert inspect.signature(ours) == inspect.signature(theirs)


@pytest.mark.parametrize("name", kernels.__all__)
def test_what_is_chosen_on_a_gpu_has_every_op(name):
    chosen, ours = getattr(backend._eager(), name), getattr(kernels, name)
    assert inspect.signature(chosen).parameters.keys() == inspect.signature(ours).parameters.keys()


def test_linear_and_linear_dx():
    x, weight, bias, dy = (
        _random(M, K, requires_grad=True),
        _random(N, K),
        _random(N),
        _random(M, N),
    )
    expected = x @ weight.t() + bias
    expected.backward(dy)
    torch.testing.assert_close(reference.linear(x, weight, bias), expected)
    torch.testing.assert_close(reference.linear(x, weight), expected - bias)
    torch.testing.assert_close(reference.linear_dx(dy, weight), x.grad)


@pytest.mark.parametrize("compact", [False, True])
def test_slice_grad(dim, index, compact):
    x, dy, weight = _random(M, K), _random(M, N), _random(N, K, requires_grad=True)
    F.linear(x, weight).backward(dy)
    expected = _cut(weight.grad, index, dim)
    if compact:
        x, dy = (reference.take(x, index), dy) if dim == "in" else (x, reference.take(dy, index))
        index = None
    torch.testing.assert_close(reference.slice_grad(dy, x, index, dim), expected)
    out = torch.ones_like(expected)
    assert reference.slice_grad(dy, x, index, dim, out) is out
    torch.testing.assert_close(out, expected + 1)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_slice_grad_adds_into_other_dtypes(dim, index, out_dtype):
    x, dy = _random(M, K).to(torch.float16), _random(M, N).to(torch.float16)
    exact = reference.slice_grad(dy.double(), x.double(), index, dim)
    grad = reference.slice_grad(dy, x, index, dim)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad.double(), exact, rtol=1e-6, atol=1e-6)
    out = torch.ones_like(grad, dtype=out_dtype)
    reference.slice_grad(dy, x, index, dim, out)
    torch.testing.assert_close(out, (grad + 1).to(out_dtype))


@pytest.mark.parametrize("kind", ["run", "any", "compact"])
def test_slice_grad_each(dim, kind):
    """Three experts, the second without pairs, against autograd on their dense weights."""
    offsets = torch.tensor([4, 4, M], dtype=torch.int32)
    x, dy, weight = _random(M, K), _random(M, N), _random(3, N, K, requires_grad=True)
    torch.cat([x[:4] @ weight[0].t(), x[4:] @ weight[2].t()]).backward(dy)
    index = slice(1, 1 + R)
    if kind == "any":
        index = torch.stack([make_index("any", K if dim == "in" else N, R) for _ in offsets])
    each = index if kind == "any" else [index] * 3
    cuts = zip(weight.grad, each, strict=True)
    expected = torch.stack([_cut(grad, where, dim) for grad, where in cuts])
    if kind == "compact":
        x, dy = (reference.take(x, index), dy) if dim == "in" else (x, reference.take(dy, index))
        index = None
    out = torch.ones_like(expected)
    assert reference.slice_grad_each(dy, x, offsets, index, dim, out) is out
    torch.testing.assert_close(out, expected + 1)
    assert (out[1] == 1).all()


@pytest.mark.parametrize("kind", ["run", "any", None])
def test_swiglu_and_swiglu_bwd(kind):
    gate, up = _random(M, K, requires_grad=True), _random(M, K, requires_grad=True)
    index = None if kind is None else make_index(kind, K, R)
    dh = _random(M, K)
    h = gate / (1 + torch.exp(-gate)) * up
    h.backward(dh)
    gate, dgate, up, dup = gate.detach(), gate.grad, up.detach(), up.grad
    torch.testing.assert_close(reference.swiglu(gate, up), h.detach())
    *actual, h_slice = reference.swiglu_bwd(dh, gate, up, index)
    torch.testing.assert_close(actual, [dgate, dup])
    if index is None:
        assert h_slice is None
    else:
        torch.testing.assert_close(h_slice, _cut(h.detach(), index, "in"))
        assert h_slice.is_contiguous()


def test_slice_write(dim, index):
    weight, delta = _random(N, K), _delta(dim)
    base, expected = _cut(weight, index, dim).clone(), _effective(weight, delta, index, dim)
    before, version = weight.clone(), weight._version
    reference.slice_write([weight], [base], [delta], [index], [dim])
    torch.testing.assert_close(weight, expected)
    reference.slice_write([weight], [base], [None], [index], [dim])
    assert weight.equal(before)
    assert weight._version == version


def test_slice_linear(dim, index):
    x, dy, weight, delta = _random(M, K), _random(M, N), _random(N, K), _delta(dim)
    effective = _effective(weight, delta, index, dim)
    y, dx = F.linear(x, weight), dy @ weight
    assert reference.slice_linear_(y, x, delta, index, dim) is y
    assert reference.slice_linear_dx_(dx, dy, delta, index, dim) is dx
    torch.testing.assert_close(y, F.linear(x, effective))
    torch.testing.assert_close(dx, dy @ effective)
    if dim == "in":
        y = F.linear(x, weight)
        reference.slice_linear_(y, reference.take(x, index), delta, None, dim)
        torch.testing.assert_close(y, F.linear(x, effective))


@pytest.mark.parametrize("index", [slice(2, 5), torch.tensor([4, 0, 2], dtype=torch.int32)])
def test_take_is_a_copy(index):
    x = _random(M, K)
    taken = reference.take(x, index)
    assert taken.equal(_cut(x, index, "in"))
    assert taken.is_contiguous()
    assert taken.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
