"""FlatAdamW with its step in the backward: equal to two passes, or refused."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from captured_models import assert_same, batch, record_steps
from peft import get_peft_model
from tiny_models import checkpoint_activations, tiny_model, token_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

from s2kernels import capture
from s2kernels.autograd import s2_delta, s2_linear
from s2kernels.flat import FlatAdamW
from s2kernels.peft import S2FTConfig
from s2kernels.reference import slice_write

N, K, R = 33, 21, 3
INDEX = torch.tensor([6, 0, 3], dtype=torch.int32)
OPTIONS = dict(lr=0.02, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.1)
DIMS = pytest.mark.parametrize("dim", ["in", "out"])


class Layer(nn.Module):
    """A frozen weight (N, K) with a delta."""

    def __init__(self, dim, dtype=torch.float32, mode="additive", impl=None, index=INDEX):
        super().__init__()
        make = torch.Generator().manual_seed(0)
        self.dim, self.mode, self.impl, self.index = dim, mode, impl, index
        self.weight = torch.randn(N, K, generator=make, dtype=torch.float64).to(dtype)
        shape = (N, R) if dim == "in" else (R, K)
        self.delta = nn.Parameter(torch.randn(shape, generator=make, dtype=torch.float64).to(dtype))
        self.base_slice = torch.zeros_like(self.delta) if mode == "inplace" else None

    def forward(self, x):
        options = dict(dim=self.dim, impl=self.impl)
        if self.mode == "delta":
            base = nn.functional.linear(x, self.weight)
            return s2_delta(base, x, self.delta, self.index, **options)
        if self.base_slice is not None:
            slice_write([self.weight], [self.base_slice], [self.delta], [self.index], [self.dim])
        options |= dict(mode=self.mode)
        return s2_linear(x, self.weight, self.delta, self.index, **options)


def loss_of(layer, seed):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, K, generator=make, dtype=torch.float64)
    return layer(x.to(layer.delta.dtype)).square().mean()


def train(model, optimizer, loss, steps):
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.7)
    for i in range(steps):
        optimizer.zero_grad()
        loss(model, i).backward()
        optimizer.step()
        schedule.step()


def pair(model, **options):
    """(model, its optimizer with the step in the backward), (its twin, the optimizer without)."""
    twin = copy.deepcopy(model)
    ours = FlatAdamW(trained(model), **OPTIONS | options, step_in_backward=True)
    return (model, ours), (twin, FlatAdamW(trained(twin), **OPTIONS | options))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def assert_equal(one, other, **tolerance):
    """Parameters and states."""
    (model, ours), (twin, theirs) = one, other
    for p, q in zip(trained(model), trained(twin), strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        assert ours.state[p].keys() == theirs.state[q].keys()
        for name, value in theirs.state[q].items():
            torch.testing.assert_close(ours.state[p][name], value, **tolerance)


FP32 = dict(rtol=2e-5, atol=2e-6)
FP64 = dict(rtol=1e-12, atol=1e-13)


@DIMS
@pytest.mark.parametrize("mode", ["inplace", "additive", "delta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fifty_steps_are_those_of_two_passes(dtype, mode, dim):
    both = pair(Layer(dim, dtype, mode))
    for model, optimizer in both:
        train(model, optimizer, loss_of, 50)
    assert_equal(*both, **FP32 if dtype == torch.float32 else FP64)
    assert both[0][0].delta.grad is None
    assert both[0][1]._blocks[0][0].grads.numel() == 0
    assert both[0][1].state[both[0][0].delta]["step"] == 50


@DIMS
@pytest.mark.parametrize("index", [INDEX, slice(2, 2 + R)], ids=["any", "run"])
def test_the_kernels_train_the_same(index, dim, device):
    layer = Layer(dim, index=index)
    twin = copy.deepcopy(layer)
    layer.impl, twin.impl = "triton", "torch"
    if device.type == "cuda":
        pytest.skip("Layer is on the CPU: tests of whole models run the kernels on a GPU")
    both = pair(layer)[0], pair(twin)[1]
    for model, optimizer in both:
        train(model, optimizer, loss_of, 5)
    assert_equal(*both, **FP32)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["inplace", "additive"])
def test_a_model_trains_the_same(mode, checkpointing, device):
    """All seven matrices of a block, the fused FFN among them, in fp32."""
    config = S2FTConfig(heads=2, channels=6, mode=mode)
    model = get_peft_model(tiny_model("llama", torch.float32).to(device).train(), config)
    if checkpointing:
        checkpoint_activations(model.get_base_model(), {"use_reentrant": False})
    both = pair(model)
    ids = token_ids().to(device)
    for each, optimizer in both:
        train(each, optimizer, lambda m, i: m(input_ids=ids, labels=ids).loss, 6)
    assert_equal(*both, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in model.parameters())
    assert both[0][1]._blocks[0][0].grads.numel() == 0


def test_the_step_is_done_in_the_backward_and_counted_by_step():
    layer = Layer("in")
    before = layer.delta.detach().clone()
    optimizer = FlatAdamW(trained(layer), **OPTIONS, step_in_backward=True)
    loss_of(layer, 0).backward()
    after = layer.delta.detach().clone()
    assert not torch.equal(after, before)
    optimizer.step()
    assert torch.equal(layer.delta, after)
    assert layer.delta.grad is None and optimizer.state[layer.delta]["step"] == 1


def test_a_step_is_noticed_by_a_backward_that_needs_what_was_before():
    layer = Layer("in")
    optimizer = FlatAdamW(trained(layer), **OPTIONS, step_in_backward=True)
    first = loss_of(layer, 0)
    with torch.no_grad():
        layer.delta.add_(1)
    before = layer.delta.detach().clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()
    assert torch.equal(layer.delta, before)
    optimizer.step()
    assert not optimizer.state


class Mixed(nn.Module):
    """Deltas, one of which has a hook, and parameters that autograd trains."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = Layer("out"), Layer("in"), nn.LayerNorm(N)
        self.unused = nn.Parameter(torch.ones(4))
        self.second.delta.register_hook(lambda grad: 2 * grad)

    def forward(self, x):
        return self.norm(self.first(x) + self.second(x))


def test_other_parameters_and_hooks_have_ordinary_gradients():
    both = pair(Mixed())
    hook = both[1][0].second.delta.register_hook(lambda grad: 2 * grad)
    assert hook is not None  # a copy of a parameter has no hooks

    def loss(model, seed):
        make = torch.Generator().manual_seed(seed)
        return (model(torch.randn(2, 5, K, generator=make)) * torch.arange(N)).square().mean()

    for model, optimizer in both:
        train(model, optimizer, loss, 10)
    model, optimizer = both[0]
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {"second.delta", "norm.weight", "norm.bias"}
    assert model.unused not in optimizer.state or not optimizer.state[model.unused]
    optimizer.state.pop(model.unused, None), both[1][1].state.pop(both[1][0].unused, None)
    for p, q in zip(model.parameters(), both[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, **FP32)


def test_a_parameter_that_is_left_out_of_a_step_keeps_its_count():
    """As torch counts: each parameter by its own gradients."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Layer("in"), Layer("in"), Layer("in")

    both = pair(Two())
    for model, optimizer in both:
        for i in range(9):
            optimizer.zero_grad()
            parts = [model.a, model.c] if i % 3 else [model.b, model.c]
            sum(loss_of(part, i) for part in parts).backward()
            optimizer.step()
    assert_equal(*both, **FP32)
    counts = [both[0][1].state[p]["step"].item() for p in trained(both[0][0])]
    assert counts == [6, 3, 9]


def test_states_are_those_of_torchs_adamw():
    both = pair(Layer("in"))
    for model, optimizer in both:
        train(model, optimizer, loss_of, 4)
    states = both[0][1].state_dict()
    model, twin = both[0][0], copy.deepcopy(both[0][0])
    torchs = torch.optim.AdamW(trained(twin), **OPTIONS)
    torchs.load_state_dict(states)
    again = copy.deepcopy(model)
    ours = FlatAdamW(trained(again), lr=1.0, step_in_backward=True)
    ours.load_state_dict(states)
    for each, optimizer in ((twin, torchs), (again, ours)):
        for i in range(5):
            optimizer.zero_grad()
            loss_of(each, i).backward()
            optimizer.step()
    assert again.delta.grad is None
    torch.testing.assert_close(again.delta, twin.delta, **FP32)


def test_a_deep_copy_of_the_optimizer_goes_on_apart():
    layer = Layer("in")
    optimizer = FlatAdamW(trained(layer), **OPTIONS, step_in_backward=True)
    train(layer, optimizer, loss_of, 2)
    other, copied = copy.deepcopy((layer, optimizer))
    assert copied.step_in_backward
    train(layer, optimizer, loss_of, 3)
    train(other, copied, loss_of, 3)
    assert torch.equal(layer.delta, other.delta) and other.delta.grad is None


def test_replays_of_a_captured_step_are_the_loop(monkeypatch, device):
    record_steps(monkeypatch, device)
    config = S2FTConfig(heads=2, channels=6)
    model = get_peft_model(tiny_model("llama", torch.float32).to(device).train(), config)
    options = dict(lr=2**-7, capturable=True)
    both = pair(model, **options)
    (model, ours), (twin, _) = both
    theirs = FlatAdamW(trained(twin), **OPTIONS | options, step_in_backward=True)
    step = capture(model, ours, warmup=2)
    for i in range(8):
        data = batch(device, i)
        loss = step(data)
        theirs.zero_grad()
        expected = twin(**data).loss
        expected.backward()
        theirs.step()
        assert torch.equal(loss, expected), i
    assert_same(model, twin)
    assert step.replays == 6
    with pytest.raises(ValueError, match="max_norm must be None with step_in_backward"):
        capture(model, ours, max_norm=1.0)


def test_a_recording_that_fails_uses_up_nothing(monkeypatch, device):
    record_steps(monkeypatch, device)
    config = S2FTConfig(heads=2, channels=6)
    model = get_peft_model(tiny_model("llama", torch.float32).to(device).train(), config)
    (model, ours), (twin, _) = pair(model, lr=2**-7, capturable=True)
    theirs = FlatAdamW(
        trained(twin), **OPTIONS | dict(lr=2**-7), capturable=True, step_in_backward=True
    )

    class Fails(torch.autograd.Function):
        """In the backward of a step that is recorded, once all gradients but one are used up."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            dx.sum().item()
            return dx

    steps = []

    def loss(model, data):
        steps.append(data)
        inner = model.get_base_model().model
        x = inner.embed_tokens(data["input_ids"]).requires_grad_()
        x = Fails.apply(x) if len(steps) == 2 else x
        return model(inputs_embeds=x, labels=data["labels"]).loss

    step = capture(model, ours, warmup=1, loss=loss)
    for i in range(4):
        data = batch(device, i)
        if i == 1:
            with pytest.raises(RuntimeError, match="cannot be captured"):
                step(data)
            continue
        got = step(data)
        theirs.zero_grad()
        expected = twin(**data).loss
        expected.backward()
        theirs.step()
        torch.testing.assert_close(got, expected)
    assert step.replays == 1
    for p, q in zip(trained(model), trained(twin), strict=True):
        torch.testing.assert_close(p, q)


@DIMS
def test_a_second_gradient_before_the_step_is_refused(dim):
    """Accumulation over micro-batches; and the next step may come once this one was counted."""
    layer = Layer(dim)
    optimizer = FlatAdamW(trained(layer), **OPTIONS, step_in_backward=True)
    loss_of(layer, 0).backward()
    after = layer.delta.detach().clone()
    with pytest.raises(RuntimeError, match="second gradient before optimizer.step()"):
        loss_of(layer, 1).backward()
    assert torch.equal(layer.delta, after)
    optimizer.step()
    loss_of(layer, 1).backward()
    optimizer.step()
    assert optimizer.state[layer.delta]["step"] == 2


def refused(layer, optimizer, match, make_loss, **options):
    """The backward raises, nothing changes, and the next step is done."""
    before, count = layer.delta.detach().clone(), len(optimizer.state)
    with pytest.raises(RuntimeError, match=match):
        make_loss().backward(**options)
    gc.collect()  # pytest's error holds the graph
    assert torch.equal(layer.delta, before) and layer.delta.grad is None
    optimizer.step()
    assert len(optimizer.state) == count
    loss_of(layer, 0).backward()
    optimizer.step()
    assert not torch.equal(layer.delta, before)


@DIMS
@pytest.mark.parametrize("option", ["retain_graph", "create_graph"])
def test_a_graph_that_is_kept_is_refused(dim, option):
    layer = Layer(dim)
    optimizer = FlatAdamW(trained(layer), **OPTIONS, step_in_backward=True)
    match = "without retain_graph and create_graph"
    refused(layer, optimizer, match, lambda: loss_of(layer, 0), **{option: True})


def test_two_forwards_before_a_backward_are_refused():
    layer = Layer("in")
    optimizer = FlatAdamW(trained(layer), **OPTIONS, step_in_backward=True)
    match = "read by 2 forwards"
    refused(layer, optimizer, match, lambda: loss_of(layer, 3) + loss_of(layer, 4))  # used twice
    other = loss_of(layer, 1)
    with pytest.raises(RuntimeError, match=match):
        loss_of(layer, 2).backward()
    del other
    gc.collect()
    loss_of(layer, 2).backward()  # what nobody holds any more does not count
    optimizer.step()
    with torch.no_grad():
        other = loss_of(layer, 1)
    loss_of(layer, 2).backward()
    optimizer.step()
    assert other is not None and optimizer.state[layer.delta]["step"] == 3


def test_a_layer_that_is_computed_again_after_its_step_is_refused():
    """One that two checkpoints share: the second one would read what the first one has stepped."""
    layer = Layer("in")
    optimizer = FlatAdamW(trained(layer), **OPTIONS, step_in_backward=True)

    def loss():
        x = torch.ones(2, K, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=True)
        return checkpoint(layer, y[:, :K], use_reentrant=True).square().mean()

    with pytest.raises(RuntimeError, match="computed again inside of the backward"):
        loss().backward()
    optimizer.step()


@pytest.mark.parametrize("order", [1, -1])
def test_a_term_of_the_loss_that_reads_a_delta_is_refused(order):
    layer = Layer("in")
    optimizer = FlatAdamW(trained(layer), **OPTIONS, step_in_backward=True)
    first, second = (loss_of(layer, 0), layer.delta.sum())[::order]
    with pytest.raises(RuntimeError, match="this gradient was used up"):
        (first + second).backward()
    optimizer.step()


@pytest.mark.parametrize("norm", ["clip_grad_norm_", "clip_grad_value_"])
def test_clipping_is_refused(norm):
    layer = Layer("in")
    optimizer = FlatAdamW(trained(layer), **OPTIONS, step_in_backward=True)
    loss_of(layer, 0).backward()
    with pytest.raises(RuntimeError, match="this gradient was used up"):
        getattr(nn.utils, norm)(layer.parameters(), 1.0)
    assert nn.utils.clip_grad_norm_(layer.parameters(), float("inf")) >= 1e12  # not known
    optimizer.step()


def test_logging_a_norm_leaves_ordinary_gradients_alone():
    model = Mixed()
    optimizer = FlatAdamW(trained(model), **OPTIONS, step_in_backward=True)
    model(torch.ones(2, 5, K)).square().mean().backward()
    want = model.norm.weight.grad.clone()
    for foreach in (False, None):
        nn.utils.clip_grad_norm_(model.parameters(), float("inf"), foreach=foreach)
        assert torch.equal(model.norm.weight.grad, want)
    optimizer.step()


def test_several_processes_are_refused(monkeypatch):
    layer = Layer("in")
    optimizer = FlatAdamW(trained(layer), **OPTIONS, step_in_backward=True)
    before = layer.delta.detach().clone()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="must not train on several processes"):
        loss_of(layer, 0).backward()
    assert torch.equal(layer.delta, before) and layer.delta.grad is None
    optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_is_refused(unscale):
    layer = Layer("in")
    optimizer = FlatAdamW(trained(layer), **OPTIONS, step_in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(layer, 0)).backward()
    with pytest.raises(RuntimeError, match="this gradient was used up"):
        scaler.unscale_(optimizer) if unscale else scaler.step(optimizer)


def test_fp16_is_refused():
    layer = Layer("in")
    optimizer = FlatAdamW(trained(layer), **OPTIONS, step_in_backward=True)
    before = layer.delta.detach().clone()
    layer.weight = layer.weight.half()
    x = torch.ones(2, K, dtype=torch.float16)
    with pytest.raises(TypeError, match="must not train in float16"):
        layer(x).sum().backward()
    assert torch.equal(layer.delta, before)
    assert not optimizer._blocks[0][0].moments[0].numel()


def test_what_the_optimizer_refuses():
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    before = half.data_ptr()
    with pytest.raises(ValueError, match="params must be in fp32 for step_in_backward"):
        FlatAdamW([half], step_in_backward=True)
    assert half.data_ptr() == before
    with pytest.raises(ValueError, match="give one of the two"):
        FlatAdamW([nn.Parameter(torch.ones(3))], accumulate_in_backward=True, step_in_backward=True)


def test_a_move_between_backward_and_step():
    """Of one delta, and of the whole model, gradients included: the step is counted, once."""
    both = pair(Layer("in"))
    for (layer, optimizer), moves in zip(both, (True, False), strict=True):
        for i in range(3):
            optimizer.zero_grad()
            loss_of(layer, i).backward()
            if moves and i == 1:
                layer.delta.data = layer.delta.data.clone()
            elif moves:
                layer.double().float()
            with pytest.raises(RuntimeError) if moves and i == 1 else nullcontext():
                if moves and i == 1:
                    optimizer._up_to_date(0)
                    loss_of(layer, i).backward()
            optimizer.step()
    assert_equal(*both, **FP32)


def test_a_state_dict_between_backward_and_step():
    both = pair(Layer("in"))
    (layer, ours), _ = both
    for model, optimizer in both:
        for i in range(2):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            if optimizer is ours:
                saved = ours.state_dict()
                assert saved["state"][0]["step"] == i + 1
            optimizer.step()
    assert_equal(*both, **FP32)
    loss_of(layer, 2).backward()
    ours.load_state_dict(saved)  # what is loaded counts as it is
    ours.step()
    assert ours.state[layer.delta]["step"] == 2
    loss_of(layer, 3).backward()
    ours.step()


def test_groups_of_their_own_rates():
    model = nn.ModuleList([Layer("in"), Layer("out")])
    twin = copy.deepcopy(model)

    def optimizer_of(model, **options):
        groups = [
            dict(params=[each.delta], lr=lr) for each, lr in zip(model, (0.1, 0.01), strict=True)
        ]
        groups[1]["weight_decay"] = 0.3
        return FlatAdamW(groups, **OPTIONS, **options)

    both = (model, optimizer_of(model, step_in_backward=True)), (twin, optimizer_of(twin))
    for each, optimizer in both:
        train(each, optimizer, lambda m, i: loss_of(m[0], i) + loss_of(m[1], i), 50)
    assert_equal(*both, **FP32)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_transformers_trainer(micro_batches, tmp_path):
    """A schedule and resuming; more than one micro-batch for a step is refused."""
    from transformers import Trainer, TrainingArguments

    rows = [dict(input_ids=row, labels=row) for row in token_ids(batch=16)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=4,
        gradient_accumulation_steps=micro_batches, max_grad_norm=0, lr_scheduler_type="linear",
        report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip

    def run(step_in_backward, **resume):
        config = S2FTConfig(heads=1, channels=4)
        model = get_peft_model(tiny_model("llama", torch.float32), config)
        optimizer = FlatAdamW(trained(model), **OPTIONS, step_in_backward=step_in_backward)
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train(**resume)
        return torch.cat([p.detach().flatten() for p in trained(model)])

    if micro_batches > 1:
        with pytest.raises(RuntimeError, match="second gradient before optimizer.step()"):
            run(True)
        return
    want, got = run(False), run(True)
    assert torch.equal(run(True, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), got)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert want.abs().max() > 0.01
