"""SpIEL's base is never lost, whatever is done with adapters and weights."""

import copy

import pytest
import torch
from model_states import assert_same, base_state
from peft import PeftModel, get_peft_model
from spiel_models import EVERY_MODE, IDS, config, deltas, layers, randomized, train, wrapped
from tiny_models import tiny_model
from torch import nn

from s2kernels.peft.spiel.model import random_entries


@EVERY_MODE
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_base_comes_back_bit_for_bit(dtype, mode):
    model = tiny_model("llama", dtype)
    original, logits = base_state(model), model(IDS).logits
    model = wrapped(model, mode=mode, reselection_steps=3, accumulation_steps=1).train()
    assert {delta.dtype for delta in deltas(model)} == {torch.float32}
    train(model, steps=5)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, logits)
        assert_same(base_state(model), original)
    trained = model(IDS).logits
    assert not torch.equal(trained, logits)
    assert_same(base_state(model), original)
    assert torch.equal(model(IDS).logits, trained)

    model.merge_adapter()
    assert torch.equal(model(IDS).logits, trained)
    changed = base_state(model)
    for layer in layers(model):
        weight, before = changed[f"{layer.name}.weight"], original[f"{layer.name}.weight"]
        others = torch.ones(weight.numel(), dtype=torch.bool)
        others[layer.spiel_index["default"].long()] = False
        assert torch.equal(weight.flatten()[others], before.flatten()[others])
        assert not torch.equal(weight, before)
    model.unmerge_adapter()
    assert_same(base_state(model), original)
    assert torch.equal(model(IDS).logits, trained)

    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged(IDS).logits, trained) and not layers(merged)
    base = model.unload()
    assert_same(base_state(base), original)
    assert not base._forward_pre_hooks and not base._forward_hooks
    assert not hasattr(base, "_ddp_params_and_buffers_to_ignore")


def test_an_exception_in_a_forward_restores_the_base():
    model = tiny_model("llama", torch.float32)
    original = [p.detach().clone() for p in model.parameters()]
    model = randomized(wrapped(model, mode="inplace"))
    want = model(IDS).logits

    def fail(module, args):
        raise KeyError("in the middle")

    hook = model.base_model.model.model.layers[1].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="in the middle"):
        model(IDS)
    hook.remove()
    raw = [p for name, p in model.named_parameters() if "spiel_" not in name]
    assert all(torch.equal(got, value) for got, value in zip(raw, original, strict=True))
    assert torch.equal(model(IDS).logits, want)


def test_other_positions_while_the_entries_are_written():
    """Assigned by whoever loads without load_state_dict: W0 goes back to where it came from."""
    model = tiny_model("llama")
    original = base_state(model)
    model = randomized(wrapped(model, mode="inplace"))
    model(IDS)
    for layer in layers(model):
        index = layer.spiel_index["default"]
        layer.spiel_index["default"] = random_entries(9, layer.name, layer.shape, len(index))
        layer.spiel_fingerprint["default"] = torch.zeros(1, dtype=torch.int64)
    want = model(IDS).logits
    assert_same(base_state(model), original)
    assert torch.equal(model(IDS).logits, want)


@EVERY_MODE
@pytest.mark.parametrize("then", ("forward", "submodule", "state_dict", "load", "merged", "dtype"))
def test_another_weight_in_the_place_of_one_with_entries(mode, then):
    """Neither is changed: what was there gets its W0 back, and the new one is W0 from then on."""
    model = randomized(wrapped(mode=mode))
    layer = layers(model)[0]
    old, index = layer.base_layer.weight, layer.spiel_index["default"].long()
    original = old.detach().clone()
    model(IDS)
    if then == "merged":
        model.merge_adapter()
    fresh = torch.randn(
        layer.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8)
    )
    layer.base_layer.weight = nn.Parameter(fresh.clone(), requires_grad=False)
    wanted = fresh.clone()
    wanted.view(-1)[index] += layer.spiel_delta["default"].detach()
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    if then == "forward":
        model(IDS)
    elif then == "load":
        model.load_state_dict(model.state_dict())
    elif then == "merged":
        model.unmerge_adapter()
    elif then == "dtype":
        model.float()
        model.double()
        fresh, wanted = fresh.float().double(), wanted.float().double()
    if then != "state_dict":
        want = nn.functional.linear(x, wanted, layer.base_layer.bias)
        error = (layer(x) - want).detach().abs().max()
        assert error < (1e-5 if then == "dtype" else 1e-12)
    state = model.state_dict()
    name = f"base_model.model.{layer.name}."
    assert torch.equal(state[f"{name}base_layer.weight"], fresh)
    assert torch.equal(old, original)
    # the fingerprint is that of the new base
    again = tiny_model("llama")
    with torch.no_grad():
        again.get_submodule(layer.name).weight.copy_(fresh)
    loaded = wrapped(again, mode=mode)
    loaded.load_state_dict(state)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_weight_that_comes_to_be_shared_is_left_alone():
    model = randomized(wrapped(mode="auto"))
    model(IDS)
    blocks = model.base_model.model.model.layers
    first, second = (block.mlp.down_proj for block in blocks)
    assert second.keeper.written(second) == "default"
    second.base_layer.weight = first.base_layer.weight
    want = first.base_layer.weight.detach().clone()
    held = first.keeper.held_by_layer[first]
    entries, index = held.base, held.where
    want.view(-1)[index.long()] = entries
    model(IDS)
    assert first.keeper.written(first) is second.keeper.written(second) is None
    assert torch.equal(first.base_layer.weight, want)


@EVERY_MODE
def test_several_adapters(mode, tmp_path):
    model = tiny_model("llama")
    original, logits = base_state(model), model(IDS).logits
    model = randomized(wrapped(model, mode=mode))
    first = model(IDS).logits
    model.add_adapter("second", config(mode=mode, num_tunable_weights=700, seed=9))
    randomized(model, "second", seed=6)
    assert torch.equal(model(IDS).logits, first)
    model.set_adapter("second")
    second = model(IDS).logits
    assert (second - first).abs().max() > 1e-3
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)

    model.merge_adapter(adapter_names=["default", "second"])
    both = model(IDS).logits
    model.unmerge_adapter()
    assert_same(base_state(model), original)
    dense = tiny_model("llama")
    for layer in layers(model):
        weight = dense.get_submodule(layer.name).weight.data.view(-1)
        for name in ("default", "second"):
            weight[layer.spiel_index[name].long()] += layer.spiel_delta[name].detach()
    assert (dense(IDS).logits - both).abs().max() < 1e-12

    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one SpIEL adapter can be active at a time"):
        model(IDS)
    with pytest.raises(ValueError, match="does not go with SpIEL"):
        model(input_ids=IDS, adapter_names=["default", "second", "default"])
    model.set_adapter("second")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path / "second", adapter_name="second"
    )
    assert torch.equal(loaded(IDS).logits, second)
    model.delete_adapter("default")
    assert torch.equal(model(IDS).logits, second)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, logits)
    assert_same(base_state(model.unload()), original)


@EVERY_MODE
def test_a_deep_copy_trains_apart(mode):
    model = wrapped(mode=mode, reselection_steps=3, accumulation_steps=1).train()
    train(model, steps=2)
    before = model(IDS).logits.detach()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, before)
    losses = train(twin, steps=5)
    assert losses[-1] < losses[0]
    assert torch.equal(model(IDS).logits, before)
    assert_same(base_state(twin), base_state(model))


@EVERY_MODE
def test_safe_merge_looks_at_what_the_weight_would_hold(mode):
    """A sum that fp32 holds may be infinite in the weight's dtype."""
    model = nn.Sequential(nn.Linear(24, 16, dtype=torch.float16))
    original = model[0].weight.clone()
    model = wrapped(model, target_modules=["0"], num_tunable_weights=50, mode=mode)
    randomized(model, scale=1e5)
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layers(model)[0].weight, original)


def test_a_change_of_dtype_keeps_the_entries_in_place():
    model = tiny_model("llama", torch.float32)
    original = {name: value.double() for name, value in base_state(model).items()}
    model = randomized(wrapped(model))
    want = model(IDS).logits
    model.double()
    assert (model(IDS).logits - want).abs().max() < 1e-4
    assert_same(base_state(model), original)


def test_a_shared_weight_is_trained_in_a_copy():
    model = tiny_model("llama")
    blocks = model.model.layers
    blocks[1].mlp.down_proj.weight = blocks[0].mlp.down_proj.weight
    original = base_state(model)
    model = randomized(wrapped(model))
    model(IDS)
    inplace = [layer.name for layer in layers(model) if layer.keeper.written(layer)]
    assert len(inplace) == 12 and not any("down_proj" in name for name in inplace)
    assert_same(base_state(model), original)
    with pytest.raises(ValueError, match="the weight is shared by 2 modules"):
        get_peft_model(model.unload(), config(mode="inplace"))
