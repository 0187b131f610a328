"""Linear layers of experts: gradients of slices against dense autograd, and what is saved."""

from contextlib import contextmanager

import pytest
import torch
from numerics import assert_as_accurate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure.memory import kept_by
from s2kernels.autograd.experts import (
    expert_delta,
    expert_linear,
    experts_forward,
    route,
)

E, M, T, K, F = 4, 7, 2, 6, 5  # experts, tokens, experts a token, hidden and FFN channels
MODES = pytest.mark.parametrize("mode", ("inplace", "additive"))


class Experts(nn.Module):
    """What transformers keeps of a mixture, gate included."""

    def __init__(self, dtype, sizes=(E, K, F)):
        super().__init__()
        self.num_experts, hidden, inner = sizes
        self.gate_up = draw(self.num_experts, 2 * inner, hidden, dtype=dtype) * hidden**-0.5
        self.down = draw(self.num_experts, hidden, inner, dtype=dtype) * inner**-0.5

    def _apply_gate(self, y):
        gate, up = y.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def some_experts(num=E, tokens=M):
    """Experts (M, T) of each token; the last expert gets none."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(num - 1, generator=generator)[:T] for _ in range(tokens)]
    return torch.stack(rows) if rows else torch.empty(0, T, dtype=torch.long)


def drawn(num_experts, size, num):
    """Channels (E, R) in any order, others for each expert."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randperm(size, generator=generator)[:num] for _ in range(num_experts)]
    return torch.stack(rows).to(torch.int32)


def positions(index, num_experts):
    if isinstance(index, slice):
        index = torch.arange(index.start, index.stop).expand(num_experts, -1)
    return torch.arange(num_experts).unsqueeze(1), index.long()


def with_slice(weight, delta, index, dim):
    """W0 + scatter(delta, index), for autograd."""
    weight = weight.clone()
    where = positions(index, len(weight))
    rows = weight.mT if dim == "in" else weight
    rows[where] = rows[where] + (delta.mT if dim == "in" else delta).to(weight.dtype)
    return weight


def linear_of(mode, weight, delta, index, dim, from_tokens, impl=None):
    """The layer under test, as the host calls it."""
    if mode == "inplace":
        written = with_slice(weight, delta.detach(), index, dim)
        options = dict(delta=delta, index=index, dim=dim, from_tokens=from_tokens, impl=impl)
        return lambda x, routing: expert_linear(x, written, routing, **options)

    def added(x, routing):
        y = expert_linear(x, weight, routing, from_tokens=from_tokens, impl=impl)
        return expert_delta(y, x, delta, index, dim, routing, from_tokens=from_tokens, impl=impl)

    return added


def by_definition(module, x, experts, scores, gate_up, down):
    y = torch.zeros_like(x)
    for token in range(len(x)):
        for place, expert in enumerate(experts[token].tolist()):
            h = module._apply_gate(gate_up[expert] @ x[token])
            y[token] = y[token] + scores[token, place] * (down[expert] @ h)
    return y


def case(dtype=torch.float64, layout="gather", sizes=(E, K, F), tokens=M):
    num, hidden, inner = sizes
    module = Experts(dtype, sizes)
    index_out = slice(1, 4) if layout == "run" else drawn(num, 2 * inner, 3)
    index_in = slice(0, 2) if layout == "run" else drawn(num, inner, 2)
    leaves = dict(
        x=draw(tokens, hidden, dtype=dtype, seed=3),
        scores=draw(tokens, T, dtype=dtype, seed=4),
        delta_out=0.3 * draw(num, 3, hidden, dtype=torch.promote_types(dtype, torch.float32)),
        delta_in=0.3 * draw(num, hidden, 2, dtype=torch.promote_types(dtype, torch.float32)),
    )
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    return module, leaves, index_out, index_in, some_experts(num, tokens)


def ours(module, leaves, index_out, index_in, experts, mode, impl=None):
    gate_up = linear_of(mode, module.gate_up, leaves["delta_out"], index_out, "out", True, impl)
    down = linear_of(mode, module.down, leaves["delta_in"], index_in, "in", False, impl)
    return experts_forward(module, leaves["x"], experts, leaves["scores"], gate_up, down)


def dense(module, leaves, index_out, index_in, experts):
    gate_up = with_slice(module.gate_up, leaves["delta_out"], index_out, "out")
    down = with_slice(module.down, leaves["delta_in"], index_in, "in")
    return by_definition(module, leaves["x"], experts, leaves["scores"], gate_up, down)


def grads_of(y, leaves):
    return torch.autograd.grad(y.square().sum(), list(leaves.values()))


@MODES
@pytest.mark.parametrize("layout", ("gather", "run"))
@pytest.mark.parametrize("tokens", (M, 1))
def test_gradients_are_those_of_dense_autograd(mode, layout, tokens):
    given = case(layout=layout, tokens=tokens)
    y, want = ours(*given, mode), dense(*given)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for name, got, grad in zip(
        given[1], grads_of(y, given[1]), grads_of(want, given[1]), strict=True
    ):
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(got, grad, rtol=1e-11, atol=1e-11, msg=name)
    unseen = grads_of(ours(*given, mode), given[1])[2:]
    assert all((grad[-1] == 0).all() for grad in unseen)  # the expert without tokens


@MODES
@pytest.mark.parametrize("layout", ("gather", "run"))
@pytest.mark.parametrize(
    "chosen",
    (
        [[2, 3], [3, 2], [2, 3]],  # the first experts have no pairs
        [[0, 3], [3, 0], [0, 3]],  # those in the middle
        [[1, 1], [1, 1], [1, 1]],  # all but one
    ),
    ids=("last", "outer", "one"),
)
def test_experts_without_pairs(mode, layout, chosen):
    *given, experts = case(layout=layout, tokens=3)
    experts = torch.tensor(chosen, dtype=experts.dtype)
    leaves = given[1]
    ours(*given, experts, mode).square().sum().backward()
    ours(*given, experts, mode).square().sum().backward()
    for name, want in zip(leaves, grads_of(dense(*given, experts), leaves), strict=True):
        torch.testing.assert_close(leaves[name].grad, 2 * want, rtol=1e-11, atol=1e-11, msg=name)
    empty = [expert for expert in range(E) if expert not in experts]
    assert not leaves["delta_in"].grad[empty].any()
    assert not leaves["delta_out"].grad[empty].any()


class Ops(TorchDispatchMode):
    """The names of the ops of aten that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_forward_of_an_in_slice_has_as_many_ops_for_any_number_of_experts():
    counts = []
    for num in (3, 24):
        x, weight = draw(9, 16, dtype=torch.bfloat16), draw(num, 8, 16, dtype=torch.bfloat16)
        delta = draw(num, 8, 5, dtype=torch.float32).requires_grad_()
        options = dict(delta=delta, index=drawn(num, 16, 5), dim="in", from_tokens=True)
        routing = route(some_experts(num, 9), num)
        with Ops() as ops:
            expert_linear(x, weight, routing, **options)
        counts.append(len(ops.names))
    assert counts[0] == counts[1]


@MODES
@pytest.mark.parametrize("dim", ("in", "out"))
@pytest.mark.parametrize("layout", ("gather", "run"))
def test_the_gradient_of_a_slice_has_as_many_ops_for_any_number_of_experts(
    mode, dim, layout, device
):
    """With the kernels, whose launches would show as the ops that make their arguments."""
    counts = []
    for num in (3, 24):
        x, weight = draw(9, 16, dtype=torch.bfloat16), draw(num, 8, 16, dtype=torch.bfloat16)
        shape, size = ((num, 8, 5), 16) if dim == "in" else ((num, 5, 16), 8)
        index = slice(2, 7) if layout == "run" else drawn(num, size, 5).to(device)
        delta = draw(*shape, dtype=torch.float32).to(device).requires_grad_()
        layer = linear_of(mode, weight.to(device), delta, index, dim, True, "triton")
        y = layer(x.to(device), route(some_experts(num, 9).to(device), num))
        with Ops() as ops:
            (grad,) = torch.autograd.grad(y.sum(), delta)
        assert grad.any()
        counts.append(len(ops.names))
    assert counts[0] == counts[1]


def test_no_tokens():
    given = case(tokens=0)
    for mode in ("inplace", "additive"):
        y = ours(*given, mode)
        assert y.shape == (0, K)
        assert all((grad == 0).all() for grad in grads_of(y, given[1])[2:])


@MODES
@pytest.mark.parametrize("layout", ("gather", "run"))
def test_the_triton_kernels_give_the_same(mode, layout, device):
    given = case(torch.float32, layout)
    module, leaves, *indices, experts = given
    want = grads_of(ours(*given, mode, impl="torch"), leaves)
    module.gate_up, module.down = module.gate_up.to(device), module.down.to(device)
    moved = {n: leaf.detach().to(device).requires_grad_() for n, leaf in leaves.items()}
    indices = [i.to(device) if isinstance(i, torch.Tensor) else i for i in indices]
    got = grads_of(ours(module, moved, *indices, experts.to(device), mode, impl="triton"), moved)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)


@MODES
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_as_accurate_as_dense_autograd_in_the_same_dtype(mode, dtype):
    """In bf16, and sizes in whole 16 bytes, as a grouped GEMM."""
    sizes = (3, 16, 24)
    given = case(dtype, sizes=sizes, tokens=9)
    module, leaves, *rest = given
    exact_module = Experts(torch.float64, sizes)
    exact_module.gate_up, exact_module.down = module.gate_up.double(), module.down.double()
    doubled = {n: leaf.detach().double().requires_grad_() for n, leaf in leaves.items()}
    exact = dense(exact_module, doubled, *rest)
    eager, got = dense(*given), ours(*given, mode)
    assert_as_accurate(got.detach(), exact.detach(), eager.detach())
    results = zip(
        grads_of(got, leaves), grads_of(exact, doubled), grads_of(eager, leaves), strict=True
    )
    for one, best, other in results:
        assert_as_accurate(one, best, other)


@MODES
def test_what_is_saved_beyond_the_frozen_layers(mode):
    """In-slice: its channels of each pair. Out-slice: the tokens, once."""
    sizes, tokens = (E, 32, 40), 24
    module, leaves, index_out, index_in, experts = case(torch.float32, sizes=sizes, tokens=tokens)

    def saved(trained):
        def layer(name, weight, index, dim, from_tokens):
            if name in trained:
                return linear_of(mode, weight, leaves[name], index, dim, from_tokens)
            return lambda x, routing: expert_linear(x, weight, routing, from_tokens=from_tokens)

        def forward():
            x = leaves["x"] * 1  # as that of a norm is: alive only if someone saves it
            gate_up = layer("delta_out", module.gate_up, index_out, "out", True)
            down = layer("delta_in", module.down, index_in, "in", False)
            return experts_forward(module, x, experts, leaves["scores"], gate_up, down).sum()

        held = nn.ParameterList([*leaves.values(), module.gate_up, module.down])
        held.indices = [index_out, index_in]
        kept = kept_by(forward, held)
        return kept.saved + kept.unseen

    floor = saved(())
    written = {"inplace": lambda weight: weight.numel() * 4, "additive": lambda weight: 0}[mode]
    in_slice = saved(("delta_in",)) - floor - written(module.down)
    assert in_slice == tokens * T * 2 * 4
    out_slice = saved(("delta_out",)) - floor - written(module.gate_up)
    assert out_slice == tokens * 32 * 4


def test_route():
    experts = torch.tensor([[2, 0], [0, 3], [2, 3]])
    with Ops() as ops:
        routing = route(experts, 5)
    assert routing.ends == (2, 2, 4, 6, 6)
    assert routing.offsets.dtype == torch.int32 and routing.offsets.tolist() == [2, 2, 4, 6, 6]
    assert routing.order.tolist() == [1, 2, 0, 4, 3, 5]
    assert routing.inverse[routing.order].tolist() == list(range(6))
    # each waits for a GPU, as tolist does, which is no op here
    assert not {"bincount", "_local_scalar_dense", "nonzero", "unique"} & set(ops.names)


@pytest.mark.parametrize("wrong", (4, -1))
def test_route_refuses_unknown_experts(wrong):
    with pytest.raises(ValueError, match=f"experts 0 to 3 wanted, got {wrong}"):
        route(torch.tensor([[wrong, 0], [1, 3]]), 4)


def test_the_backward_runs_inside_of_what_holds_the_weight():
    routing = route(some_experts(), E)
    weight, x = draw(E, F, K), draw(M, K, seed=1).requires_grad_()
    right = weight.clone()

    @contextmanager
    def holding():
        weight.data.copy_(right)
        yield

    options = dict(from_tokens=True, holding=holding())
    y = expert_linear(x, weight, routing, **options)
    weight.data.zero_()
    (got,) = torch.autograd.grad(y.sum(), x)
    plain = expert_linear(x, right, routing, from_tokens=True)
    (want,) = torch.autograd.grad(plain.sum(), x)
    assert torch.equal(got, want) and want.abs().max() > 0
