"""Adapters on bases that are quantized: trained beside them, saved, loaded, never merged into."""

from functools import partial

import pytest
import torch
from adapter_models import deltas, layers, randomized, train
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_module_weight
from quantized_models import KINDS, WIDE, dequantized, quantized
from tiny_models import tiny_model, token_ids
from torch import nn

from s2kernels.peft import S2FTConfig, SpIELConfig, SpIELLinear

IDS = token_ids(batch=3)
CONFIGS = {
    "s2ft": partial(S2FTConfig, heads=2, channels=6, seed=1),
    "spiel": partial(SpIELConfig, density=0.03, seed=3, reselection_steps=4, accumulation_steps=2),
}
CONFIGS["spiel in bf16"] = partial(CONFIGS["spiel"], delta_dtype="bfloat16")
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def stored(layer):
    """What the base layer holds; as numbers where a tensor of torchao stands for them."""
    weight = layer.get_base_layer().weight
    packed = type(weight).__module__.startswith("bitsandbytes.")
    return weight.data.clone() if packed else dequantized(layer)


@EVERY_CONFIG
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_trains_and_stays_as_it_is(kind, config, tmp_path):
    model = get_peft_model(quantized(kind), config()).train()
    wanted = torch.bfloat16 if "delta_dtype" in config.keywords else torch.float32
    assert {delta.dtype for delta in deltas(model)} == {wanted}
    before = [stored(layer) for layer in layers(model)]
    index = [layer.indices["default"].clone() for layer in layers(model)]
    losses = train(model, steps=8, lr=0.05)
    assert losses[-1] < 0.9 * losses[0]
    for layer, held, first in zip(layers(model), before, index, strict=True):
        assert torch.equal(stored(layer), held)
        is_spiel = isinstance(layer, SpIELLinear)  # which trains other entries by now
        assert torch.equal(layer.indices["default"], first) != is_spiel

    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(kind), tmp_path)
    with torch.no_grad():  # bitsandbytes has another product where there are gradients
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="merged into a plain dense weight"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="mode='inplace' needs a plain dense weight"):
        get_peft_model(quantized(kind), config(mode="inplace"))


# Not S2FT on int8 of bitsandbytes: that rounds activations, too, and is no product with any dense
# weight. SpIEL dequantizes the weight itself.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ("s2ft", "spiel"))
def test_gradients_are_those_of_the_dequantized_weight(name, kind):
    """Against plain linear layers that hold what the quantized ones stand for."""
    if (name, kind) == ("s2ft", "int8"):
        pytest.skip("activations are rounded, too")
    model = randomized(get_peft_model(quantized(kind), CONFIGS[name]()))
    dense = tiny_model("llama", torch.float32, **WIDE)
    linears = {name: m for name, m in dense.named_modules() if type(m) is nn.Linear}
    del linears["lm_head"]
    wrapped = {layer.name: layer for layer in layers(model)}
    with torch.no_grad():
        for name, linear in linears.items():
            if name in wrapped:
                weight = dequantized(wrapped[name]) + wrapped[name].get_delta_weight("default")
            else:
                weight = dequantize_module_weight(model.base_model.model.get_submodule(name))
            linear.weight.copy_(weight)
    dense.requires_grad_(True)
    for each in (model, dense):
        each(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in wrapped.items():
        grad, index = linears[name].weight.grad, layer.indices["default"].long()
        want = grad.flatten()[index] if isinstance(layer, SpIELLinear) else grad[:, index]
        assert want.abs().max() > 1e-6
        torch.testing.assert_close(
            layer.deltas["default"].grad, want, rtol=1e-3, atol=1e-5 * want.abs().max()
        )


def test_the_budget_counts_what_packed_weights_stand_for():
    model, full = quantized("nf4"), tiny_model("llama", torch.float32, **WIDE)
    packed, dense = (
        get_peft_model(base, CONFIGS["spiel"]()).peft_config["default"].to_dict()
        for base in (model, full)
    )
    assert packed["num_tunable_weights"] == dense["num_tunable_weights"] > 0


@EVERY_CONFIG
def test_a_model_prepared_for_kbit_training_with_checkpointing(config):
    model = prepare_model_for_kbit_training(quantized("nf4 double"))
    model = get_peft_model(model, config()).train()
    losses = train(model, steps=6, lr=0.05)
    assert losses[-1] < losses[0]
