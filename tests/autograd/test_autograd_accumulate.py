"""Gradients that the backward adds into .grad itself: their values, and when it leaves them."""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from numerics import assert_as_accurate
from peft import get_peft_model
from tiny_models import tiny_model, token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from s2kernels.autograd import s2_delta, s2_linear, s2_mlp
from s2kernels.autograd.experts import expert_delta, expert_linear, route
from s2kernels.flat import FlatAdamW
from s2kernels.peft import S2FTConfig

N, K, R = 33, 21, 3
INDEX = torch.tensor([6, 0, 3], dtype=torch.int32)
DIMS = pytest.mark.parametrize("dim", ("in", "out"))
IMPLS = ("torch", "triton")


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Layer:
    """A frozen weight (N, K) with a delta, and as many tokens as a micro-batch has."""

    def __init__(self, dim, index=INDEX, dtype=torch.float64, device="cpu", mode="additive"):
        self.dim, self.mode = dim, mode
        self.index = index.to(device) if isinstance(index, torch.Tensor) else index
        self.weight = randn(N, K, dtype=dtype).to(device)
        delta = randn(N, R) if dim == "in" else randn(R, K)
        wide = torch.promote_types(dtype, torch.float32)
        self.delta = nn.Parameter(delta.to(device, wide))
        self.dtype, self.device = dtype, device

    def x(self, seed, tokens=(2, 5)):
        wide = randn(*tokens, 2 * K, seed=seed, dtype=self.dtype).to(self.device)
        return wide[..., ::2].requires_grad_()

    def dy(self, seed, tokens=(2, 5)):
        return randn(*tokens, N, seed=seed + 50, dtype=self.dtype).to(self.device)

    def __call__(self, x, impl=None):
        options = dict(dim=self.dim, impl=impl)
        if self.mode == "delta":
            base = nn.functional.linear(x, self.weight)
            return s2_delta(base, x, self.delta, self.index, **options)
        return s2_linear(x, self.weight, self.delta, self.index, mode=self.mode, **options)

    def exact(self, seeds, dtype=torch.float64):
        """The sum of d_delta over micro-batches, by its equation, each rounded to `dtype`."""
        total = torch.zeros_like(self.delta, dtype=dtype)
        index = torch.arange(100, device=self.device)[self.index].long()
        for seed in seeds:
            x, dy = self.x(seed).detach().to(dtype), self.dy(seed).to(dtype)
            x, dy = x.reshape(-1, K), dy.reshape(-1, N)
            total += dy.t() @ x[:, index] if self.dim == "in" else dy[:, index].t() @ x
        return total


def owned(*params, **options):
    return FlatAdamW(list(params), lr=0.01, accumulate_in_backward=True, **options)


def slot_of(optimizer, p):
    """p.grad must be this very storage for nothing to be copied."""
    return optimizer._blocks[0][0].slots[
        [q is p for q in optimizer._blocks[0][0].params].index(True)
    ]


class Watch(TorchDispatchMode):
    """How often each operator made or changed a tensor of these shapes, and what AdamW updated."""

    def __init__(self, *shapes):
        super().__init__()
        self.shapes, self.counts, self.updated = shapes, {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._fused_adamw_:
            self.updated.append([tuple(p.shape) for p in args[0]])
        if isinstance(result, torch.Tensor) and tuple(result.shape) in self.shapes:
            name = func.overloadpacket.__name__
            self.counts[name] = self.counts.get(name, 0) + 1
        return result


@pytest.mark.slow
@DIMS
@pytest.mark.parametrize(
    "mode, impl",
    [("inplace", "torch"), ("additive", "torch"), ("delta", "torch"), ("additive", "triton")],
)
@pytest.mark.parametrize("index", (slice(2, 5), INDEX), ids=("run", "scattered"))
def test_three_micro_batches_are_added_up(dim, mode, impl, index, device, dtypes):
    seeds = (1, 2, 3)
    for dtype in dtypes if impl == "triton" else (torch.float64, *dtypes):
        layer, other = (Layer(dim, index, dtype, device, mode) for _ in range(2))
        optimizer = owned(layer.delta, nn.Parameter(torch.ones(5, device=device)))
        for step in range(2):  # the second one meets gradients of the first
            for seed in seeds:
                for each in (layer, other):
                    each(each.x(seed), impl).backward(each.dy(seed))
            assert layer.delta.grad is slot_of(optimizer, layer.delta)
            exact = layer.exact(seeds)
            if dtype == torch.float64:
                torch.testing.assert_close(layer.delta.grad, exact, rtol=0, atol=1e-12)
            else:
                assert_as_accurate(layer.delta.grad, exact, other.delta.grad)
            other.delta.grad = None
            if step == 0:
                optimizer.zero_grad()
                assert layer.delta.grad is None


@pytest.mark.parametrize("drop", ("optimizer", "model", "optimizer to zero"))
def test_however_gradients_are_dropped_nothing_stays_behind(drop):
    layers = [Layer("in"), Layer("out"), Layer("in")]
    params = nn.ParameterList([layer.delta for layer in layers])
    optimizer = owned(*params)

    def backward(seed, which):
        for layer in which:
            layer(layer.x(seed)).backward(layer.dy(seed))

    for seed in range(1, 4):
        which = layers if seed != 2 else layers[:2]
        if drop == "optimizer":
            optimizer.zero_grad()
        elif drop == "model":
            params.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=False)
        backward(seed, which)
        for layer in layers:
            want = layer.exact([seed] if layer in which else [])
            if layer not in which and drop != "optimizer to zero":
                assert layer.delta.grad is None
            else:
                torch.testing.assert_close(layer.delta.grad, want, rtol=0, atol=1e-12)
    # one alone is dropped: the others keep theirs
    layers[1].delta.grad = None
    backward(5, layers)
    torch.testing.assert_close(layers[1].delta.grad, layers[1].exact([5]), rtol=0, atol=1e-12)
    for layer in layers[::2]:
        torch.testing.assert_close(layer.delta.grad, layer.exact([3, 5]), rtol=0, atol=1e-12)


@DIMS
def test_no_gradient_of_its_own_is_made_or_added(dim):
    layer = Layer(dim, dtype=torch.float32)
    layers = [layer, Layer(dim, dtype=torch.float32)]
    optimizer = owned(*(each.delta for each in layers))
    shapes = (tuple(layer.delta.shape), tuple(layer.delta.t().shape))

    def steps(layers):
        for seed in (1, 2):
            for each in layers:
                each(each.x(seed)).backward(each.dy(seed))

    flat = (slot_of(optimizer, layer.delta).untyped_storage().nbytes() // 4,)
    for which in (layers, layers[:1], layers[::-1]):  # what was left out is zeroed again, too
        with Watch(*shapes, flat) as ops:
            optimizer.zero_grad()
            steps(which)
        views = {"t", "view", "slice", "detach", "transpose", "_to_copy", "alias"}
        made = {name: count for name, count in ops.counts.items() if name not in views}
        assert made == {"addmm_": 2 * len(which), "zero_": 1}, made


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("mode", ("additive", "delta"))
@DIMS
def test_checkpointing(dim, mode, use_reentrant):
    layer = Layer(dim, mode=mode)
    optimizer = owned(layer.delta)
    for seed in (1, 2):
        y = checkpoint(layer, layer.x(seed), use_reentrant=use_reentrant)
        y.backward(layer.dy(seed))
    assert layer.delta.grad is slot_of(optimizer, layer.delta)
    torch.testing.assert_close(layer.delta.grad, layer.exact([1, 2]), rtol=0, atol=1e-12)


def test_saved_tensors_that_were_moved_away():
    layer = Layer("in")
    optimizer = owned(layer.delta)
    with torch.autograd.graph.save_on_cpu():
        y = layer(layer.x(1))
    y.backward(layer.dy(1))
    assert layer.delta.grad is slot_of(optimizer, layer.delta)
    torch.testing.assert_close(layer.delta.grad, layer.exact([1]), rtol=0, atol=1e-12)


def test_a_graph_that_is_kept_counts_twice():
    layer = Layer("out")
    optimizer = owned(layer.delta)
    y = layer(layer.x(1))
    y.backward(layer.dy(1), retain_graph=True)
    y.backward(layer.dy(1))
    assert layer.delta.grad is slot_of(optimizer, layer.delta)
    torch.testing.assert_close(layer.delta.grad, 2 * layer.exact([1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("before", (False, True), ids=("no gradient yet", "gradient there"))
def test_autograd_grad_gets_the_gradient_and_leaves_grad_alone(before):
    layer = Layer("in")
    optimizer = owned(layer.delta)
    if before:
        layer(layer.x(2)).backward(layer.dy(2))
    x = layer.x(1)
    got = torch.autograd.grad(layer(x), [layer.delta, x], layer.dy(1))
    torch.testing.assert_close(got[0], layer.exact([1]), rtol=0, atol=1e-12)
    torch.autograd.grad(layer(x), [x], layer.dy(1))
    torch.autograd.backward(layer(x), layer.dy(1), inputs=[x])
    if before:
        torch.testing.assert_close(layer.delta.grad, layer.exact([2]), rtol=0, atol=1e-12)
    else:
        assert layer.delta.grad is None
    torch.autograd.backward(layer(x), layer.dy(1), inputs=[layer.delta])
    assert layer.delta.grad is slot_of(optimizer, layer.delta)
    want = layer.exact([1, 2] if before else [1])
    torch.testing.assert_close(layer.delta.grad, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("post", (False, True), ids=("hook", "post-accumulate hook"))
def test_hooks_on_a_delta_see_its_gradient(post):
    layer, other, seen = Layer("in"), Layer("in"), []
    optimizer = owned(layer.delta, other.delta)
    other(other.x(0)).backward(other.dy(0))
    if post:
        handle = layer.delta.register_post_accumulate_grad_hook(
            lambda p: seen.append(p.grad.clone())
        )
    else:
        handle = layer.delta.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    layer(layer.x(1)).backward(layer.dy(1))
    torch.testing.assert_close(seen[0], layer.exact([1]), rtol=0, atol=1e-12)
    assert layer.delta.grad is not slot_of(optimizer, layer.delta)
    layer(layer.x(2)).backward(layer.dy(2))
    handle.remove()
    layer(layer.x(3)).backward(layer.dy(3))
    want = layer.exact([1, 2]) * (1 if post else 2) + layer.exact([3])
    torch.testing.assert_close(layer.delta.grad, want, rtol=0, atol=1e-12)
    optimizer.step()
    assert layer.delta.grad is slot_of(optimizer, layer.delta)
    torch.testing.assert_close(layer.delta.grad, want, rtol=0, atol=1e-12)
    layer.delta.grad = None  # and not the other one
    layer(layer.x(4)).backward(layer.dy(4))
    torch.testing.assert_close(layer.delta.grad, layer.exact([4]), rtol=0, atol=1e-12)


def test_a_parameter_that_moved_gets_an_ordinary_gradient_until_the_next_step():
    layer = Layer("in", dtype=torch.float32)
    optimizer = owned(layer.delta)
    holder = nn.ParameterList([layer.delta]).double()
    layer.weight, layer.dtype = layer.weight.double(), torch.float64
    layer(layer.x(1)).backward(layer.dy(1))
    torch.testing.assert_close(layer.delta.grad, layer.exact([1]), rtol=0, atol=1e-12)
    optimizer.step()
    optimizer.zero_grad()
    layer(layer.x(2)).backward(layer.dy(2))
    assert holder[0].grad is slot_of(optimizer, layer.delta)
    torch.testing.assert_close(layer.delta.grad, layer.exact([2]), rtol=0, atol=1e-12)


def test_nobody_owns_a_delta_once_its_optimizer_is_gone():
    layer = Layer("in")
    optimizer = owned(layer.delta)
    block = weakref.ref(optimizer._blocks[0][0])
    twin = copy.copy(layer)
    twin.delta = copy.deepcopy(layer.delta)
    twin(twin.x(1)).backward(twin.dy(1))
    assert layer.delta.grad is None
    torch.testing.assert_close(twin.delta.grad, layer.exact([1]), rtol=0, atol=1e-12)
    del optimizer
    gc.collect()
    assert block() is None
    layer(layer.x(1)).backward(layer.dy(1))
    layer(layer.x(2)).backward(layer.dy(2))
    torch.testing.assert_close(layer.delta.grad, layer.exact([1, 2]), rtol=0, atol=1e-12)


class ExpertLayer:
    """4 experts with weights (9, 7), of which no token goes to the last."""

    def __init__(self, dim, mode, impl, device):
        self.dim, self.mode, self.impl = dim, mode, impl
        self.dtype = torch.float64 if impl == "torch" else torch.float32
        shape, size = ((4, 9, 3), 7) if dim == "in" else ((4, 3, 7), 9)
        self.weight = randn(4, 9, 7, dtype=self.dtype).to(device)
        self.index = torch.stack([torch.randperm(size)[:3] for _ in range(4)]).int().to(device)
        self.delta = nn.Parameter(randn(*shape, dtype=self.dtype).to(device))
        self.chosen = torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0]], device=device)

    def x(self, seed):
        return randn(4, 7, seed=seed, dtype=self.dtype).to(self.delta.device).requires_grad_()

    def __call__(self, x):
        routing = route(self.chosen, 4)
        given = dict(from_tokens=True, impl=self.impl)
        trained = dict(delta=self.delta, index=self.index, dim=self.dim)
        if self.mode == "inplace":
            return expert_linear(x, self.weight, routing, **trained, **given)
        y = expert_linear(x, self.weight, routing, **given)
        return expert_delta(y, x, routing=routing, **trained, **given)


@DIMS
@pytest.mark.parametrize("mode", ("inplace", "additive"))
@pytest.mark.parametrize(
    "impl, checkpointed", [("torch", False), ("torch", True), ("triton", False)]
)
def test_experts(dim, mode, impl, checkpointed, device):
    layer = ExpertLayer(dim, mode, impl, device)
    other = copy.copy(layer)
    other.delta = copy.deepcopy(layer.delta)
    optimizer = owned(layer.delta)
    for seeds in ((3,), (1, 2)):
        optimizer.zero_grad()
        other.delta.grad = None
        for seed in seeds:
            x = layer.x(seed)
            y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
            y.square().sum().backward()
            other(other.x(seed)).square().sum().backward()
    got, want = layer.delta.grad, other.delta.grad
    assert got is slot_of(optimizer, layer.delta)
    scale = want.abs().max().item()
    atol = scale * (1e-14 if impl == "torch" else 1e-6)
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
    assert got[:3].abs().amax((1, 2)).min() > 0 and not got[3].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_mlp(impl, device):
    dtype = torch.float64 if impl == "torch" else torch.float32
    gate, up, down = (randn(*s, dtype=dtype).to(device) / 3 for s in ((9, 6), (9, 6), (5, 9)))
    index, shapes = slice(2, 5), ((3, 6), (3, 6), (5, 3))
    both = [
        [nn.Parameter(randn(*shape, seed=i, dtype=dtype).to(device) / 3) for i, shape in
         enumerate(shapes)] for _ in range(2)
    ]  # fmt: skip
    optimizer = owned(*both[0])
    for seed in (1, 2, 3):
        for deltas in both:
            x = randn(7, 6, seed=seed, dtype=dtype).to(device).requires_grad_()
            names = ("gate_delta", "up_delta", "down_delta")
            options = dict(zip(names, deltas, strict=True), mode="additive", impl=impl)
            s2_mlp(x, gate, up, down, index, **options).square().sum().backward()
    for got, want in zip(*both, strict=True):
        assert got.grad is slot_of(optimizer, got)
        atol = want.grad.abs().max().item() * (1e-14 if impl == "torch" else 1e-6)
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=atol)


def test_compiled_backwards_return_their_gradients():
    torch._dynamo.reset()
    layer = Layer("in")
    optimizer = owned(layer.delta)
    step = torch.compile(lambda x: layer(x) * 1, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        step(layer.x(seed)).backward(layer.dy(seed))
    torch.testing.assert_close(layer.delta.grad, layer.exact([1, 2]), rtol=0, atol=1e-12)
    optimizer.step()
    assert layer.delta.grad is slot_of(optimizer, layer.delta)


@pytest.mark.parametrize("mode", ("inplace", "additive"))
@pytest.mark.parametrize("checkpointing", (False, True))
def test_a_model_trains_the_same(mode, checkpointing):
    """In fp64, over steps of three micro-batches; a step zeroes once and adds nothing."""
    targets = ["q_proj", "o_proj"] if checkpointing else ["o_proj", "down_proj"]
    models = []
    for accumulate in (True, False):
        config = S2FTConfig(heads=2, channels=8, mode=mode, target_modules=targets)
        model = get_peft_model(tiny_model("llama"), config)
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = FlatAdamW(trained, lr=0.01, accumulate_in_backward=accumulate)
        flat = (sum(p.numel() for p in trained),)
        shapes = {tuple(p.shape) for p in trained}

        def step(number, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            for part in range(3):
                ids = token_ids(seed=10 * number + part)
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        for number in range(3):
            step(number)
        with Watch(flat, *shapes) as ops:
            step(3)
        # autograd adds the second and the third gradient of each
        assert ops.counts.get("add_", 0) == (0 if accumulate else 2 * len(trained))
        assert ops.counts.get("zero_", 0) == accumulate
        assert ops.updated == [[flat]] and len(trained) == 4  # two slices in each of two layers
        models.append(trained)
    for got, want in zip(*models, strict=True):
        assert want.abs().max() > 0.01
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bucket_view", (False, True))
@pytest.mark.parametrize("find_unused", (False, True))
def test_distributed_data_parallel_reduces_what_the_backward_added(bucket_view, find_unused):
    """The reduction here is a factor of 3, so that a gradient that it missed would show."""

    def tripled(state, bucket):
        future = torch.futures.Future()
        future.set_result(3 * bucket.buffer())
        return future

    class Model(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.delta, self.layer = layer.delta, layer

        def forward(self, x):
            return self.layer(x)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = Layer("in")
        optimizer = owned(layer.delta)
        model = nn.parallel.DistributedDataParallel(
            Model(layer), gradient_as_bucket_view=bucket_view, find_unused_parameters=find_unused
        )
        model.register_comm_hook(None, tripled)
        for seed in (1, 2, 3):
            optimizer.zero_grad()
            with model.no_sync():
                model(layer.x(seed)).backward(layer.dy(seed))
            model(layer.x(seed + 1)).backward(layer.dy(seed + 1))
            want = 3 * layer.exact([seed, seed + 1])
            torch.testing.assert_close(layer.delta.grad, want, rtol=0, atol=1e-11)
            optimizer.step()
            torch.testing.assert_close(layer.delta.grad, want, rtol=0, atol=1e-11)
    finally:
        dist.destroy_process_group()
