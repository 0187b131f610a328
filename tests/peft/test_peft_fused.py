"""FFNs and projections by one Function: the same as apart, and only where it is the same."""

import copy

import pytest
import torch
from fused_models import EVERY_SETTING, adapted, assert_close, blocks, gradients, taken
from peft import get_peft_model
from tiny_models import tiny_model, token_ids
from torch import nn

from bench.measure.memory import storages
from s2kernels import backend
from s2kernels.autograd.joined import joined
from s2kernels.peft import S2FTConfig
from s2kernels.peft.s2ft.fused_mlp import FusedMLP

pytestmark = pytest.mark.usefixtures("joined_as_on_a_gpu")

GATED_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "qwen3_moe")


@EVERY_SETTING
@pytest.mark.parametrize("model_type", GATED_TYPES)
def test_it_computes_what_the_modules_do(model_type, mode, layout, calls):
    fields = dict(mode=mode, layout=layout)
    want = gradients(adapted(model_type, fuse=False, **fields))
    assert taken(calls) == 0
    model = adapted(model_type, **fields)
    got = gradients(model)
    num_ffns = 1 if model_type == "qwen3_moe" else 2  # its second block is a mixture
    assert taken(calls) == num_ffns
    assert_close(got, want)
    with torch.no_grad():
        logits = model(token_ids()).logits
        apart = adapted(model_type, fuse=False, **fields)(token_ids()).logits
    torch.testing.assert_close(logits, apart, rtol=0, atol=1e-12)


@EVERY_SETTING
@pytest.mark.parametrize(
    "targets",
    [
        ["gate_proj"],
        ["up_proj", "down_proj"],
        ["gate_proj", "up_proj", "down_proj", "o_proj"],
        "all-linear",
    ],
    ids=lambda targets: "+".join(targets) if isinstance(targets, list) else targets,
)
def test_whatever_is_trained(targets, mode, layout, calls):
    fields = dict(mode=mode, layout=layout, target_modules=targets)
    want = gradients(adapted(fuse=False, **fields))
    got = gradients(adapted(**fields))
    assert taken(calls) == 2
    assert_close(got, want)


def test_gate_and_up_lie_together(calls):
    model = adapted()
    before = sum(storages(tiny_model("llama").parameters()).values())
    for block in blocks(model):
        assert joined(block.mlp.gate_proj.weight, block.mlp.up_proj.weight) is not None
    base = [p for n, p in model.named_parameters() if "s2ft_" not in n]
    assert sum(storages(base).values()) == before

    # moved, they are joined anew by the next forward
    model.to(torch.float32).to(torch.float64)
    mlp = blocks(model)[0].mlp
    assert joined(mlp.gate_proj.weight, mlp.up_proj.weight) is None
    model(token_ids())
    assert joined(mlp.gate_proj.weight, mlp.up_proj.weight) is not None
    assert sum(storages(base).values()) == before


def test_memory_that_joining_leaves_empty_is_given_back_once(monkeypatch):
    """Not once a layer: the device waits for it."""
    base, times = tiny_model("llama"), []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: times.append(1))
    model = get_peft_model(base, S2FTConfig(heads=2, channels=5))
    assert len(blocks(model)) == 2 and len(times) == 1
    for _ in range(2):
        model(token_ids())
    assert len(times) == 1
    model.state_dict()  # gives each weight a storage of its own
    for _ in range(2):
        model(token_ids())
    assert len(times) == 2


def test_neighbours_by_chance_are_joined():
    """As an allocator may lay them: the one ends where the other begins, in another storage."""
    model = adapted()
    want = gradients(model)
    mlp = blocks(model)[0].mlp
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    memory = torch.cat([gate, up]).numpy()
    gate.data = torch.from_numpy(memory[: len(gate)])
    up.data = torch.from_numpy(memory[len(gate) :])
    assert gate.data_ptr() + gate.nbytes == up.data_ptr() and joined(gate, up) is None
    assert_close(gradients(model), want)
    assert joined(gate, up) is not None


def test_on_a_cpu_nothing_is_joined(calls, monkeypatch):
    monkeypatch.setattr(backend, "prefers_joined", lambda weight: weight.is_cuda)
    want, model = gradients(adapted(fuse=False)), adapted()
    assert_close(gradients(model), want)
    assert taken(calls) == 2
    mlp = blocks(model)[0].mlp
    assert joined(mlp.gate_proj.weight, mlp.up_proj.weight) is None


@pytest.mark.parametrize("targets", [["o_proj", "down_proj"], "all-linear"], ids=("some", "all"))
@pytest.mark.parametrize("mode", ("auto", "additive"))
def test_on_the_meta_device(mode, targets):
    """What a step would be of, without doing it. There is no autocast there, and no value."""
    models = [adapted(mode=mode, layout="auto", target_modules=targets) for _ in range(2)]
    models[1].to("meta")
    shapes = []
    for model, device in zip(models, ("cpu", "meta"), strict=True):
        ids = token_ids().to(device)
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert {x.device.type for x in (output.logits, *gradients.values())} == {device}
        shapes.append((output.logits.shape, {name: x.shape for name, x in gradients.items()}))
    assert shapes[0] == shapes[1] and shapes[0][1]


def disturbances():
    def hook(model):
        blocks(model)[0].mlp.up_proj.register_forward_hook(lambda module, args, y: None)

    def inner_hook(model):
        inner = blocks(model)[0].mlp.down_proj.base_layer
        inner.register_forward_pre_hook(lambda module, args: None)

    def backward_hook(model):
        blocks(model)[0].mlp.gate_proj.register_full_backward_hook(lambda module, dx, dy: None)

    def activation_hook(model):
        blocks(model)[0].mlp.act_fn.register_forward_hook(lambda module, args, y: None)

    def activation(model):
        blocks(model)[0].mlp.act_fn = nn.GELU()

    def own_forward(model):
        gate = blocks(model)[0].mlp.gate_proj
        gate.forward = lambda x: nn.Linear.forward(gate, x)

    def subclass(model):
        class Linear(nn.Linear):
            pass

        blocks(model)[0].mlp.gate_proj.__class__ = Linear

    def trained(model):
        blocks(model)[0].mlp.gate_proj.weight.requires_grad_()

    return [
        hook,
        inner_hook,
        backward_hook,
        activation_hook,
        activation,
        own_forward,
        subclass,
        trained,
    ]


@pytest.mark.parametrize("disturb", disturbances(), ids=lambda function: function.__name__)
def test_what_cannot_be_seen_through_is_not_fused(disturb, calls):
    want_model, model = adapted(fuse=False), adapted()
    disturb(want_model)
    disturb(model)
    want, got = gradients(want_model), gradients(model)
    assert taken(calls) == 1  # the other block still is
    assert_close(got, want)


def test_hooks_of_all_modules_keep_everything_apart(calls):
    want = gradients(adapted(fuse=False))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        model = adapted()
        got = gradients(model)
    finally:
        handle.remove()
    assert taken(calls) == 0
    assert blocks(model)[0].mlp.gate_proj in seen
    assert_close(got, want)


def test_a_forward_of_something_else_is_left_alone():
    """What was there before is not replaced, and what came later is not taken off."""
    base = tiny_model("llama")
    mlp = base.model.layers[0].mlp
    own = mlp.forward = lambda x: type(mlp).forward(mlp, x)
    model = get_peft_model(base, S2FTConfig(heads=2, channels=5))
    assert mlp.forward is own
    other = blocks(model)[1].mlp
    assert isinstance(other.forward, FusedMLP)
    wrapper = other.forward = lambda x, inside=other.forward: inside(x)
    want = model(token_ids()).logits
    inner = model.unload()
    assert other.forward is wrapper
    assert torch.equal(inner(token_ids()).logits.isfinite().all(), torch.tensor(True))
    assert want.shape == inner(token_ids()).logits.shape


def test_adapters_that_differ_in_where_they_train_are_not_fused(calls):
    """gate and down train other channels here, which `mlp` has no words for."""
    layer = "model.layers.0.mlp."
    for down, num_fused in (([1, 7, 30], 1), ([30, 2, 7], 0), ([1, 7], 0)):
        indices = {f"{layer}gate_proj": [1, 7, 30], f"{layer}down_proj": down}
        fields = dict(target_modules=["gate_proj", "down_proj"], indices=indices, layout="gather")
        got, want = (gradients(adapted(fuse=fuse, **fields)) for fuse in (True, False))
        assert_close(got, want)
        assert taken(calls) == num_fused


def test_an_adapter_that_is_active_in_some_layers_only(calls):
    fields = dict(target_modules=["gate_proj", "up_proj", "down_proj"])
    for mode in ("inplace", "additive"):
        results = []
        for fuse in (False, True):
            model = adapted(fuse=fuse, mode=mode, **fields)
            blocks(model)[0].mlp.up_proj.set_adapter("none of this name")
            results.append(gradients(model))
        assert_close(results[1], results[0])
        assert taken(calls) == 2


def test_indices_that_are_loaded_later(calls):
    fields = dict(target_modules=["gate_proj", "down_proj"], layout="gather")
    model, apart = adapted(**fields), adapted(fuse=False, **fields)
    gradients(model)
    taken(calls)
    for each in (model, apart):
        name = next(n for n, _ in each.named_buffers() if "down_proj.s2ft_index" in n)
        each.load_state_dict({name: torch.arange(5, dtype=torch.int32)}, strict=False)
    assert_close(gradients(model), gradients(apart))
    assert taken(calls) == 1


def test_what_a_weight_shares_is_not_joined(calls):
    base = tiny_model("llama")
    layers = base.model.layers
    layers[1].mlp.gate_proj.weight = layers[0].mlp.gate_proj.weight
    want = gradients(
        get_peft_model(copy.deepcopy(base), S2FTConfig(heads=2, channels=5, fuse=False))
    )
    model = get_peft_model(base, S2FTConfig(heads=2, channels=5))
    assert_close(gradients(model), want)
    assert taken(calls) == 2
    assert layers[0].mlp.gate_proj.weight is layers[1].mlp.gate_proj.weight
    assert joined(layers[0].mlp.gate_proj.weight, layers[0].mlp.up_proj.weight) is None
