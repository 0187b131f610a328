"""Injection by the names in a state_dict, and into compiled models."""

import pytest
import torch
from adapter_models import EVERY_CONFIG, deltas, layers, randomized
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tiny_models import tiny_model, token_ids

from s2kernels.peft import SpIELConfig

IDS = token_ids(batch=3)


def deep(num):
    return tiny_model("llama", num_hidden_layers=num)


@EVERY_CONFIG
@pytest.mark.parametrize("low", (False, True))
def test_injection_by_a_state_dict_that_names_more_than_the_configuration(config, low):
    budget = dict(num_tunable_weights=900) if config is SpIELConfig else {}
    model = inject_adapter_in_model(config(target_modules="all-linear", **budget), deep(2))
    state = get_peft_model_state_dict(randomized(model))
    less = config(target_modules=["o_proj"], **budget)
    options = dict(state_dict=state, low_cpu_mem_usage=low)
    with pytest.warns(RuntimeWarning, match="state_dict contained these additional target modules"):
        other = inject_adapter_in_model(less, deep(2), **options)
    assert [layer.name for layer in layers(other)] == [layer.name for layer in layers(model)]
    result = set_peft_model_state_dict(other, state, low_cpu_mem_usage=low)
    assert not result.unexpected_keys
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def compiled(model, part):
    if part == "model":
        return torch.compile(model, backend="eager")
    if part == "layers":
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = torch.compile(layer, backend="eager")
    return model


@pytest.mark.slow
@EVERY_CONFIG
@pytest.mark.parametrize("part", ("model", "layers"))
def test_a_compiled_base_is_adapted_as_any_other(config, part, tmp_path):
    fields = dict(target_modules="all-linear")
    plain = randomized(get_peft_model(deep(1), config(**fields)))
    model = randomized(get_peft_model(compiled(deep(1), part), config(**fields)))
    assert [layer.name for layer in layers(model)] == [layer.name for layer in layers(plain)]
    for layer, want in zip(layers(model), layers(plain), strict=True):
        assert torch.equal(layer.indices["default"], want.indices["default"])
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain(input_ids=IDS, labels=IDS).loss.backward()
    for delta, want in zip(deltas(model), deltas(plain), strict=True):
        torch.testing.assert_close(delta.grad, want.grad)

    for source, target in ((model, "none"), (plain, part), (model, part)):
        source.save_pretrained(tmp_path / target)
        loaded = PeftModel.from_pretrained(compiled(deep(1), target), tmp_path / target)
        torch.testing.assert_close(loaded(IDS).logits, plain(IDS).logits)
    state = get_peft_model_state_dict(plain)
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    by_names = inject_adapter_in_model(config(**fields), compiled(deep(1), part), state_dict=state)
    raw = {name.replace(".self_attn", "._orig_mod.self_attn"): v for name, v in state.items()}
    assert not set_peft_model_state_dict(by_names, raw).unexpected_keys
    torch.testing.assert_close(by_names(IDS).logits, plain(IDS).logits)
