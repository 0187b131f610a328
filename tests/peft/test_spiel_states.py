"""SpIEL's base is never lost, whatever is done with adapters and weights."""

import pytest
import torch
from model_states import assert_same, base_state
from peft import PeftModel, get_peft_model
from spiel_models import EVERY_MODE, IDS, config, layers, randomized, wrapped
from tiny_models import tiny_model
from torch import nn

from s2kernels.peft.spiel.model import random_entries


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


@EVERY_MODE
def test_another_bias_in_the_place_of_one_is_added_from_then_on(mode):
    linear = nn.Linear(7, 5)
    model = randomized(
        get_peft_model(
            nn.Sequential(linear), config(num_tunable_weights=9, target_modules=["0"], mode=mode)
        )
    )
    x = torch.randn(3, 7)
    want = model(x).detach() + 1
    linear.bias = nn.Parameter(linear.bias.detach() + 1, requires_grad=False)
    torch.testing.assert_close(model(x).detach(), want)


def test_a_weight_that_comes_to_be_shared_is_left_alone():
    model = randomized(wrapped(mode="auto"))
    model(IDS)
    blocks = model.base_model.model.model.layers
    first, second = (block.mlp.down_proj for block in blocks)
    assert second.keeper.held_by_layer[second].adapter == "default"
    second.base_layer.weight = first.base_layer.weight
    want = first.base_layer.weight.detach().clone()
    held = first.keeper.held_by_layer[first]
    entries, index = held.base, held.where
    want.view(-1)[index.long()] = entries
    model(IDS)
    assert first not in first.keeper.held_by_layer
    assert second not in second.keeper.held_by_layer
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


def test_a_shared_weight_is_trained_in_a_copy():
    model = tiny_model("llama")
    blocks = model.model.layers
    blocks[1].mlp.down_proj.weight = blocks[0].mlp.down_proj.weight
    original = base_state(model)
    model = randomized(wrapped(model))
    model(IDS)
    inplace = [layer.name for layer in layers(model) if layer in layer.keeper.held_by_layer]
    assert len(inplace) == 12 and not any("down_proj" in name for name in inplace)
    assert_same(base_state(model), original)
    with pytest.raises(ValueError, match="the weight is shared by 2 modules"):
        get_peft_model(model.unload(), config(mode="inplace"))
