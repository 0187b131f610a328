"""SpIEL on bases that are quantized: the dequantized weight with the deltas added."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from quantized_models import KINDS, WIDE, dequantized, quantized
from spiel_models import deltas, layers, randomized, train
from tiny_models import tiny_model, token_ids

from s2kernels.peft import SpIELConfig

IDS = token_ids(batch=3)


def config(**fields):
    fields = dict(density=0.03, seed=3, reselection_steps=4, accumulation_steps=2) | fields
    return SpIELConfig(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta_dtype", ("float32", "bfloat16"))
def test_a_quantized_base_trains_and_stays_as_it_is(kind, delta_dtype, tmp_path):
    model = get_peft_model(quantized(kind), config(delta_dtype=delta_dtype)).train()
    before = [dequantized(layer) for layer in layers(model)]
    assert {str(delta.dtype) for delta in deltas(model)} == {f"torch.{delta_dtype}"}
    index = [layer.spiel_index["default"].clone() for layer in layers(model)]
    losses = train(model, steps=8)
    assert losses[-1] < 0.9 * losses[0]
    moved = [
        not torch.equal(layer.spiel_index["default"], first)
        for layer, first in zip(layers(model), index, strict=True)
    ]
    assert all(moved)
    for layer, want in zip(layers(model), before, strict=True):
        assert torch.equal(dequantized(layer), want)

    model.eval()
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(kind), tmp_path)
    assert torch.equal(loaded(IDS).logits, logits)
    with pytest.raises(ValueError, match="merged into a plain dense weight"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="mode='inplace' needs a plain dense weight"):
        get_peft_model(quantized(kind), config(mode="inplace"))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantized_weight(kind):
    """Against plain linear layers that hold what the quantized ones stand for."""
    model = randomized(get_peft_model(quantized(kind), config()))
    model(input_ids=IDS, labels=IDS).loss.backward()
    dense = tiny_model("llama", torch.float32, **WIDE)
    with torch.no_grad():
        for layer in layers(model):
            weight = dequantized(layer).to(torch.float32)
            weight.view(-1)[layer.spiel_index["default"].long()] += layer.spiel_delta["default"]
            dense.get_submodule(layer.name).weight.copy_(weight)
    dense.requires_grad_(True)
    dense(input_ids=IDS, labels=IDS).loss.backward()
    for layer in layers(model):
        grad = dense.get_submodule(layer.name).weight.grad.flatten()
        want = grad[layer.spiel_index["default"].long()]
        assert want.abs().max() > 1e-6
        torch.testing.assert_close(
            layer.spiel_delta["default"].grad, want, rtol=1e-3, atol=1e-5 * want.abs().max()
        )


def test_the_budget_counts_what_packed_weights_stand_for():
    model, full = quantized("nf4"), tiny_model("llama", torch.float32, **WIDE)
    packed, dense = (
        get_peft_model(base, config()).peft_config["default"].to_dict() for base in (model, full)
    )
    assert packed["num_tunable_weights"] == dense["num_tunable_weights"] > 0


def test_a_model_prepared_for_kbit_training_with_checkpointing():
    model = prepare_model_for_kbit_training(quantized("nf4 double"))
    model = get_peft_model(model, config()).train()
    losses = train(model, steps=6)
    assert losses[-1] < losses[0]
