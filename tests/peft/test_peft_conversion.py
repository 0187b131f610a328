"""PEFT makes a LoRA of an adapter of ours, by its dense delta, which is what a merge adds."""

import pytest
import torch
from adapter_models import EVERY_CONFIG, layers, randomized
from peft import convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from tiny_models import tiny_model, token_ids

from s2kernels.peft import S2FTConfig

IDS = token_ids()


def cases(config):
    if config is S2FTConfig:
        yield "llama", config(layout="permute", target_modules=["o_proj", "down_proj"])
        yield "gpt2", config(target_modules=["c_attn", "c_proj"])
    yield "llama", config(target_modules="all-linear")


@EVERY_CONFIG
def test_the_dense_delta_is_what_a_merge_adds(config):
    for kind, given in cases(config):
        model = randomized(get_peft_model(tiny_model(kind), given))
        model(IDS)
        wanted = [layer.get_delta_weight("default") for layer in layers(model)]
        model.state_dict()
        before = [layer.weight.detach().clone() for layer in layers(model)]
        model.merge_adapter()
        for layer, w0, delta in zip(layers(model), before, wanted, strict=True):
            torch.testing.assert_close(layer.weight.detach() - w0, delta.to(w0.dtype))
            assert delta.shape == w0.shape


@EVERY_CONFIG
def test_a_lora_of_sufficient_rank_is_the_same_model(config):
    for kind, given in cases(config):
        model = randomized(get_peft_model(tiny_model(kind), given))
        lora, state = convert_to_lora(model, rank=16)  # no slice is larger
        other = get_peft_model(tiny_model(kind), lora)
        assert not set_peft_model_state_dict(other, state).unexpected_keys
        difference = (other(IDS).logits - model(IDS).logits).abs().max()
        assert difference < 1e-4 * model(IDS).logits.abs().max()  # the factors are fp32


@EVERY_CONFIG
def test_hotswapping_is_refused_and_loading_into_a_name_does_the_same(config, tmp_path):
    swapped = randomized(get_peft_model(tiny_model("llama"), config(seed=9)), seed=3)
    swapped.save_pretrained(tmp_path)
    model = randomized(get_peft_model(tiny_model("llama"), config()))
    before = model(IDS).logits
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(model(IDS).logits, before)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model(IDS).logits, swapped(IDS).logits)
