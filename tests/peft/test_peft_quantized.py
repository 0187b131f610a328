"""S2FT on bases that are quantized: trained in additive mode, saved, loaded, never merged into."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_module_weight
from quantized_models import KINDS, WIDE, dequantized, quantized
from tiny_models import tiny_model, token_ids
from torch import nn

from s2kernels.peft import S2FTConfig, S2FTLinear

IDS = token_ids(batch=3)


def config(**fields):
    return S2FTConfig(**(dict(heads=2, channels=6, seed=1) | fields))


def layers(model):
    return {module.name: module for module in model.modules() if isinstance(module, S2FTLinear)}


def stored(layer):
    """What the base layer holds; as numbers where a tensor of torchao stands for them."""
    weight = layer.get_base_layer().weight
    packed = type(weight).__module__.startswith("bitsandbytes.")
    return weight.data.clone() if packed else dequantized(layer)


def train(model, steps):
    deltas = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(deltas, lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_trains_and_stays_as_it_is(kind, tmp_path):
    model = get_peft_model(quantized(kind), config()).train()
    assert len(layers(model)) == 4
    before = {name: stored(layer) for name, layer in layers(model).items()}
    losses = train(model, steps=8)
    assert losses[-1] < 0.9 * losses[0]
    for name, layer in layers(model).items():
        assert torch.equal(stored(layer), before[name])
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(kind), tmp_path)
    with torch.no_grad():  # bitsandbytes has another product where there are gradients
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="merged into a plain dense weight"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="mode='inplace' needs a plain dense weight"):
        get_peft_model(quantized(kind), config(mode="inplace"))


# Not int8 of bitsandbytes: it rounds activations, too, and is no product with any dense weight.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8"])
def test_gradients_are_those_of_the_dequantized_weight(kind):
    """Against plain linear layers that hold what the quantized ones stand for."""
    model = get_peft_model(quantized(kind), config())
    wrapped = layers(model)
    dense = tiny_model("llama", torch.float32, **WIDE)
    linears = {name: m for name, m in dense.named_modules() if type(m) is nn.Linear}
    with torch.no_grad():
        for name, linear in linears.items():
            if name == "lm_head":
                continue
            layer = model.base_model.model.get_submodule(name)
            weight = dequantized(layer) if name in wrapped else dequantize_module_weight(layer)
            linear.weight.copy_(weight)
        for name, layer in wrapped.items():
            delta = layer.s2ft_delta["default"].normal_(std=0.02)
            linears[name].weight[:, layer.s2ft_index["default"].long()] += delta
    dense.requires_grad_(True)
    for each in (model, dense):
        each(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in wrapped.items():
        want = linears[name].weight.grad[:, layer.s2ft_index["default"].long()]
        assert want.abs().max() > 1e-6
        torch.testing.assert_close(
            layer.s2ft_delta["default"].grad, want, rtol=1e-3, atol=1e-5 * want.abs().max()
        )


def test_a_model_prepared_for_kbit_training_with_checkpointing():
    model = prepare_model_for_kbit_training(quantized("nf4 double"))
    model = get_peft_model(model, config()).train()
    losses = train(model, steps=6)
    assert losses[-1] < losses[0]
