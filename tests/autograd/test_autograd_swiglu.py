"""SwiGLU between matrices that are called one by one: values, gradients, what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_accurate

from s2kernels.autograd import silu_mul


def operands(shape, dtype, device):
    make = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=make, dtype=torch.float64).to(device, dtype) for _ in "gud"
    ]


def results(function, gate, up, dh):
    gate, up = (x.detach().clone().requires_grad_() for x in (gate, up))
    h = function(gate, up)
    return h.detach(), *torch.autograd.grad(h, (gate, up), dh)


def eager(gate, up):
    return F.silu(gate) * up


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("shape", [(37,), (1, 1), (3, 5, 77), (0, 16)])
def test_as_accurate_as_torch(shape, impl, dtype, device):
    given = operands(shape, dtype, device)
    exact = results(eager, *(x.double() for x in given))
    for actual, true, plain in zip(
        results(lambda g, u: silu_mul(g, u, impl), *given),
        exact,
        results(eager, *given),
        strict=True,
    ):
        assert_as_accurate(actual, true, plain)


def test_gradcheck():
    gate, up, _ = operands((4, 7), torch.float64, "cpu")
    assert torch.autograd.gradcheck(silu_mul, (gate.requires_grad_(), up.requires_grad_()))


def test_parts_of_one_tensor(dtype, device):
    """gate and up as one product leaves them, and a gradient that is broadcast."""
    both = torch.cat(operands((3, 5, 18), dtype, device)[:2], -1)
    gate, up = both.chunk(2, -1)
    dh = torch.ones((), dtype=dtype, device=device).expand(gate.shape)
    exact = results(eager, gate.double(), up.double(), dh.double())
    for actual, true, plain in zip(
        results(lambda g, u: silu_mul(g, u, "triton"), gate, up, dh),
        exact,
        results(eager, gate, up, dh),
        strict=True,
    ):
        assert_as_accurate(actual, true, plain)


def test_it_keeps_gate_and_up_alone_and_writes_in_neither(device):
    gate, up, dh = operands((3, 8), torch.float32, device)
    kept = []
    gate.requires_grad_(), up.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        h = silu_mul(gate, up)
    assert [x.data_ptr() for x in kept] == [gate.data_ptr(), up.data_ptr()]
    first = torch.autograd.grad(h, (gate, up), dh, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(h, (gate, up), dh), strict=True):
        assert torch.equal(once, again)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="up must have the shape, dtype and device of gate"):
        silu_mul(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="up must have the shape, dtype and device of gate"):
        silu_mul(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float16))
