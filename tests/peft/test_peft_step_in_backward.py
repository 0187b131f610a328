"""Whole models by FlatAdamW(step_in_backward=True): as by two passes, and W0 comes back."""

import copy

import pytest
import torch
from fused_models import adapted
from model_states import assert_same, base_state
from tiny_models import checkpoint_activations, tiny_model, token_ids

from s2kernels.flat import FlatAdamW
from s2kernels.peft import S2FTLinear
from s2kernels.peft.s2ft import layer as s2ft_layer

OPTIONS = dict(lr=0.01, betas=(0.8, 0.97), eps=1e-4, weight_decay=0.1)
IDS = token_ids()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def deltas_of(model):
    return torch.cat([p.detach().flatten() for p in trained(model)])


def layers_of(model):
    return [each for each in model.modules() if isinstance(each, S2FTLinear)]


def backward(model):
    model(input_ids=IDS, labels=IDS).loss.backward()


def train(model, steps, **options):
    optimizer = FlatAdamW(trained(model), **OPTIONS, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        schedule.step()
    return optimizer


def assert_slices_are_current(model):
    """Every weight holds W0 + delta, rounded once, where it is trained."""
    for layer in layers_of(model):
        held = layer.keeper.held_by_layer[layer]
        before = layer.weight.detach().clone()
        with layer.keeper.forwards.lock:
            layer.keeper.ensure_written({layer: held.adapter})
        assert torch.equal(layer.weight, before), layer.name


@pytest.fixture
def writes(monkeypatch):
    """Of each launch that writes slices, how many it writes, and whether deltas are added."""
    found = []
    prepare = s2ft_layer.slice_writer

    def counted(entries):
        write = prepare(entries)

        def count_and_write():
            found.append((len(entries), entries[0][2] is not None))
            write()

        return count_and_write

    monkeypatch.setattr("s2kernels.peft.s2ft.model.slice_writer", counted)
    return found


@pytest.mark.parametrize(
    "fields",
    [
        dict(mode="inplace", layout="permute"),
        dict(mode="inplace", layout="permute", fuse=False),
        dict(mode="inplace", layout="gather", target_modules="all-linear"),
        dict(mode="additive", layout="permute", target_modules="all-linear"),
        dict(mode="additive", layout="gather", fuse=False),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_fifty_steps_are_those_of_two_passes(fields, joined_as_on_a_gpu):
    """In fp64, where rounding is too small to show after 50 steps."""
    model, twin = (adapted(**fields).train() for _ in range(2))
    before, base = deltas_of(model), base_state(adapted(**fields))
    ours, _ = train(model, 50, step_in_backward=True), train(twin, 50)
    if fields["mode"] == "inplace":
        assert_slices_are_current(model)
    got, want = deltas_of(model), deltas_of(twin)
    assert (got - want).abs().max() < 1e-9 and (want - before).abs().max() > 0.1
    assert not ours._blocks[0][0].grads.numel() and all(p.grad is None for p in trained(model))
    assert_same(base_state(model), base)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
def test_steps_in_fp32(model_type):
    """gpt2 stores its weights transposed; phi3 has gate and up in one."""
    models = [adapted(model_type, torch.float32).train() for _ in range(2)]
    train(models[0], 6, step_in_backward=True)
    train(models[1], 6)
    assert_slices_are_current(models[0])
    torch.testing.assert_close(*map(deltas_of, models), rtol=1e-3, atol=1e-4)


def test_weights_in_bf16(writes):
    """The deltas are in fp32, and the slices their sum with W0, rounded once."""
    model = adapted(dtype=torch.bfloat16).train()
    before = base_state(adapted(dtype=torch.bfloat16))
    train(model, 5, step_in_backward=True)
    assert len(writes) == 1
    assert_slices_are_current(model)
    twin = adapted(dtype=torch.bfloat16).train()
    train(twin, 5)
    torch.testing.assert_close(deltas_of(model), deltas_of(twin), rtol=0, atol=0.03)
    assert_same(base_state(model), before)


def test_no_forward_writes_slices_once_a_backward_has(writes):
    model = adapted().train()
    num = len(layers_of(model))
    optimizer = train(model, 3, step_in_backward=True)
    assert writes == [(num, True)]
    with torch.no_grad():  # whoever writes to a delta is noticed
        trained(model)[0].mul_(0.5)
    backward(model)
    assert writes == [(num, True)] * 2
    optimizer.step()
    state = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(state, strict=False)
    writes.clear()
    with torch.no_grad():
        loss = model(input_ids=IDS, labels=IDS).loss
    assert (num, True) in writes
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=IDS, labels=IDS).loss, loss)


def test_a_twin_by_two_passes_writes_in_every_forward(writes):
    """So that the test above can fail."""
    model = adapted().train()
    train(model, 3)
    assert writes == [(len(layers_of(model)), True)] * 3


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("layout", ["permute", "gather"])
def test_checkpoints_of_blocks(layout, use_reentrant, joined_as_on_a_gpu):
    """A block is computed again before any of it is stepped."""
    models = [adapted(layout=layout, target_modules="all-linear").train() for _ in range(2)]
    for model in models:
        checkpoint_activations(model.get_base_model(), {"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    train(models[0], 8, step_in_backward=True)
    train(models[1], 8)
    assert (deltas_of(models[0]) - deltas_of(models[1])).abs().max() < 1e-9
    assert_slices_are_current(models[0])


@pytest.mark.parametrize("first", [0, 1])
def test_what_comes_between_backward_and_step(first):
    """Looking at the model, without its adapter, merged, and as it is saved, changes nothing."""
    models = [adapted().train() for _ in range(2)]
    base = base_state(adapted())

    def disabled(model):
        with model.disable_adapter(), torch.no_grad():
            model(input_ids=IDS)

    def merged(model):
        model.merge_adapter()
        model.unmerge_adapter()

    def saved(model):
        assert_same(base_state(model), base)

    def evaluated(model):
        with torch.no_grad():
            model(input_ids=IDS)

    optimizers = [
        FlatAdamW(trained(model), **OPTIONS, step_in_backward=model is models[0])
        for model in models
    ]
    for look in (disabled, merged, saved, evaluated):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            if model is models[0] and first:
                loss = model(input_ids=IDS, labels=IDS).loss
                if look in (disabled, evaluated):  # the slices are taken out before the backward
                    look(model)
                loss.backward()
            else:
                backward(model)
            if model is models[0]:
                look(model)
            optimizer.step()
    assert (deltas_of(models[0]) - deltas_of(models[1])).abs().max() < 1e-9


class Stopped(BaseException):
    """As KeyboardInterrupt, which pytest takes for itself."""


@pytest.mark.parametrize("error", [RuntimeError, Stopped])
def test_a_backward_that_stops_between_layers(error):
    """The layers that it reached are stepped and the others are not; W0 comes back to the bit; and
    step() counts, after which the next one may come.
    """
    model = adapted().train()
    before, base = deltas_of(model), base_state(adapted())
    optimizer = FlatAdamW(trained(model), **OPTIONS, step_in_backward=True)
    block = model.get_base_model().model.layers[1]

    def stop(module, args, output):
        output.register_hook(raise_it)

    def raise_it(grad):
        raise error("stopped")

    handle = model.get_base_model().model.layers[0].register_forward_hook(stop)
    with pytest.raises(error):
        backward(model)
    handle.remove()
    reached = {id(p) for p in block.parameters() if p.requires_grad}
    moved = {
        id(p): not torch.equal(p, q)
        for p, q in zip(trained(model), trained(adapted()), strict=True)
    }
    assert moved == {id(p): id(p) in reached for p in trained(model)}
    assert before.shape == deltas_of(model).shape
    assert_slices_are_current(model)
    assert_same(base_state(model), base)
    after = deltas_of(model)
    with pytest.raises(RuntimeError, match="after a backward that failed call"):
        backward(model)
    assert torch.equal(deltas_of(model), after)
    optimizer.step()
    assert {id(p) for p in optimizer.state} == reached
    backward(model)
    optimizer.step()
    steps = {id(p): optimizer.state[p]["step"].item() for p in trained(model)}
    assert steps == {id(p): 2 if id(p) in reached else 1 for p in trained(model)}
    assert_same(
        copy.deepcopy(model).unload().state_dict(), tiny_model("llama", torch.float64).state_dict()
    )


def test_a_layer_of_a_model_that_is_used_twice_is_refused():
    model = adapted().train()
    before = deltas_of(model)
    optimizer = FlatAdamW(trained(model), **OPTIONS, step_in_backward=True)
    inner = model.get_base_model().model
    inner.layers[1] = inner.layers[0]
    with pytest.raises(RuntimeError, match="read by 2 forwards"):
        backward(model)
    assert torch.equal(deltas_of(model), before[: len(deltas_of(model))])
    optimizer.step()
    assert not optimizer.state
