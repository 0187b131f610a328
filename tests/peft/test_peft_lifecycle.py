"""Adapters that cannot be added or merged leave the model as it was, in every method."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_model, token_ids
from torch.optim.swa_utils import AveragedModel

from s2kernels.peft import S2FTConfig, SpIELConfig
from s2kernels.peft.host.layer import AdapterLayer

EVERY_CONFIG = pytest.mark.parametrize("config", (S2FTConfig, SpIELConfig))
IDS = token_ids(batch=2)


def layers(model):
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def deltas(model, name="default"):
    return [getattr(layer, layer.adapter_layer_names[0])[name] for layer in layers(model)]


def wrapped(config, model):
    model = get_peft_model(model, config(target_modules=["o_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for delta in deltas(model):
            delta.copy_(torch.randn(delta.shape, generator=generator, dtype=delta.dtype))
    return model


def flags(model):
    return {name: value.requires_grad for name, value in model.named_parameters()}


@EVERY_CONFIG
def test_a_second_adapter_that_fails_half_way(config):
    """o_proj of the first block has it already when the shared down_proj refuses."""
    model = tiny_model("llama")
    blocks = model.model.layers
    blocks[1].mlp.down_proj.weight = blocks[0].mlp.down_proj.weight
    model = wrapped(config, model)
    want, before = model(IDS).logits, flags(model)
    with pytest.raises(ValueError, match="the weight is shared by 2 modules"):
        model.add_adapter("second", config(target_modules=["o_proj", "down_proj"], mode="inplace"))
    assert set(model.peft_config) == {"default"}
    assert all(set(layer.modes) == {"default"} for layer in layers(model))
    assert flags(model) == before
    assert torch.equal(model(IDS).logits, want)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(delta.grad is not None for delta in deltas(model))


@EVERY_CONFIG
def test_no_adapter_is_added_to_merged_ones(config):
    model = wrapped(config, tiny_model("llama"))
    model.merge_adapter()
    want = model(IDS).logits
    with pytest.raises(ValueError, match="call unmerge_adapter first"):
        model.add_adapter("second", config(target_modules=["o_proj"]))
    assert torch.equal(model(IDS).logits, want)
    model.unmerge_adapter()
    model.add_adapter("second", config(target_modules=["o_proj"]))
    assert [set(layer.modes) for layer in layers(model)] == 2 * [{"default", "second"}, {"default"}]


@EVERY_CONFIG
@pytest.mark.parametrize("how", ("merge_adapter", "merge_and_unload"))
def test_the_last_layer_is_looked_at_before_the_first_one_is_merged(config, how):
    model = tiny_model("llama")
    original = {name: value.clone() for name, value in model.named_parameters()}
    model = wrapped(config, model)
    last = deltas(model)[-1]
    with torch.no_grad():
        last.view(-1)[-1] = torch.inf
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        getattr(model, how)(safe_merge=True)
    assert not any(layer.merged for layer in layers(model))
    state = model.state_dict()
    for layer in layers(model):
        got = state[f"base_model.model.{layer.name}.base_layer.weight"]
        assert torch.equal(got, original[f"{layer.name}.weight"])
    with torch.no_grad():
        last.view(-1)[-1] = 0
    want = model(IDS).logits
    merged = getattr(model, how)(safe_merge=True) or model
    torch.testing.assert_close(merged(IDS).logits, want)


@EVERY_CONFIG
def test_an_average_of_the_weights_is_that_of_the_deltas(config):
    """Where both models have given W0 back, in the original basis, as they do for a state_dict."""
    model = wrapped(config, tiny_model("llama"))
    average = AveragedModel(model)
    for scale in (1.0, 3.0):
        with torch.no_grad():
            for delta in deltas(model):
                delta.mul_(scale)
        model(IDS)
        model.state_dict(), average.state_dict()
        average.update_parameters(model)
        average(IDS)
    for mean, delta in zip(deltas(average), deltas(model), strict=True):
        assert torch.allclose(mean, delta * (2 / 3), rtol=0, atol=1e-12)
    with torch.no_grad():
        for delta in deltas(model):
            delta.mul_(2 / 3)
    assert (average(IDS).logits - model(IDS).logits).abs().max() < 1e-12
