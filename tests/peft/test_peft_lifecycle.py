"""Adapters that cannot be added or merged leave the model as it was, in every method."""

import pytest
import torch
from adapter_models import EVERY_CONFIG, deltas, layers, randomized
from model_states import assert_same
from peft import get_peft_model
from safetensors.torch import load_file
from saved_adapters import TENSORS
from tiny_models import tiny_model, token_ids
from torch.optim.swa_utils import AveragedModel

from s2kernels.peft import SpIELConfig

IDS = token_ids(batch=2)


def wrapped(config, model, **fields):
    model = get_peft_model(model, config(target_modules=["o_proj", "down_proj"], **fields))
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
@pytest.mark.parametrize("options", ({}, dict(layout="permute")))
def test_an_adapter_is_added_beside_a_merged_one(config, options, tmp_path):
    """PEFT unmerges then, as it does for LoRA; the new one is an adapter of W0."""
    if config is SpIELConfig and options:
        pytest.skip("SpIEL has no layouts")
    fields = dict(target_modules=["o_proj"], seed=5) | options
    model = wrapped(config, tiny_model("llama"), **options)
    alone = get_peft_model(tiny_model("llama"), config(**fields))
    randomized(alone, "default")
    model.merge_adapter()
    want = model(IDS).logits
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", config(**fields))
    randomized(model, "second")
    assert (model(IDS).logits - want).abs().max() < 1e-12
    model.set_adapter("second")
    assert (model(IDS).logits - alone(IDS).logits).abs().max() < 1e-12
    model.save_pretrained(tmp_path / "both", selected_adapters=["second"])
    alone.save_pretrained(tmp_path)
    got, want = (load_file(f / TENSORS) for f in (tmp_path / "both" / "second", tmp_path))
    assert_same(got, want)


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
