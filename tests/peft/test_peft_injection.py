"""What a configuration makes of a model, and what is refused before anything changes."""

import pytest
import torch
from model_states import assert_same, base_state
from peft import get_peft_model, inject_adapter_in_model
from s2ft_models import WIDE, config, deltas, randomized
from tiny_models import MODEL_TYPES, tiny_model, token_ids
from torch import nn
from transformers.pytorch_utils import Conv1D

from s2kernels.coupling import channels_of_heads
from s2kernels.peft import S2FTLinear, report
from s2kernels.peft.s2ft.layer import S2FTLayer
from s2kernels.select import random_units


def test_the_default_trains_the_drawn_heads_and_channels_of_o_and_down(capsys):
    model = tiny_model("llama", **WIDE)
    model = get_peft_model(model, config(layout="gather"))
    for block in range(2):
        layer = model.base_model.model.model.layers[block]
        heads = random_units(3, f"model.layers.{block}.self_attn", 8, 2)
        channels = random_units(3, f"model.layers.{block}.mlp", 192, 64)
        o_proj, down_proj = layer.self_attn.o_proj, layer.mlp.down_proj
        assert torch.equal(o_proj.s2ft_index["default"], channels_of_heads(heads, 4))
        assert torch.equal(down_proj.s2ft_index["default"], channels)
        assert o_proj.s2ft_delta["default"].shape == (32, 8)
        assert down_proj.s2ft_delta["default"].shape == (32, 64)
        assert not isinstance(layer.mlp.up_proj, S2FTLinear)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.get_nb_trainable_parameters()[0] == trainable == 2 * (32 * 8 + 32 * 64)
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,} ||" in capsys.readouterr().out


def test_the_default_targets_of_each_type_are_trained():
    for model_type in MODEL_TYPES:
        model = get_peft_model(tiny_model(model_type, **WIDE), config())
        dims = [m.dim for m in model.modules() if isinstance(m, S2FTLayer)]
        # two blocks, each with an attention and a FFN or the experts of one
        assert dims == ["in"] * 4, model_type


def test_the_report_counts_what_is_trained():
    model = get_peft_model(
        tiny_model("llama", **WIDE), config(target_modules=["o_proj", "up_proj"])
    )
    lines = [line.split() for line in report(model).splitlines()]
    assert len(lines) == 1 + 4 + 1
    name = "model.layers.1.mlp.up_proj"
    (row,) = (line for line in lines if line[0] == name)
    assert row == [name, "out", "64", "192", "2,048", "64", f"{2048 / (32 + 192):.1f}"]
    assert lines[-1] == ["total", f"{model.get_nb_trainable_parameters()[0]:,}"]
    with pytest.raises(ValueError, match="no S2FT adapter named 'other'"):
        report(model, "other")


def test_injection_without_a_peft_model():
    ids = token_ids()
    model = tiny_model("llama", **WIDE)
    original, logits = base_state(model), model(ids).logits
    model = inject_adapter_in_model(config(), model)
    assert (model(ids).logits - logits).abs().max() < 1e-12
    randomized(model)
    assert (model(ids).logits - logits).abs().max() > 1e-3
    assert_same(base_state(model), original)


@pytest.mark.parametrize("selection", ("random", "weight"))
@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (dict(layers_to_transform=[1]), ["1.self_attn.o_proj", "1.mlp.down_proj"]),
        (dict(exclude_modules=["o_proj"]), ["0.mlp.down_proj", "1.mlp.down_proj"]),
        (dict(target_modules=r".*\.1\.mlp\.(up|down)_proj"), ["1.mlp.up_proj", "1.mlp.down_proj"]),
    ],
)
def test_peft_fields_choose_the_targets(fields, wanted, selection):
    model = get_peft_model(tiny_model("llama", **WIDE), config(selection=selection, **fields))
    names = [name.removeprefix("base_model.model.model.layers.") for name in deltas(model)]
    assert [name.removesuffix(".s2ft_delta.default") for name in names] == wanted


def test_auto_is_additive_where_a_weight_is_shared():
    model = tiny_model("llama", torch.float32, **WIDE)
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    original = base_state(model)
    model = randomized(get_peft_model(model, config()))
    model(token_ids())
    assert not any("mlp" in name for name in model.base_model.keeper.arrangement.permutations)
    with pytest.raises(ValueError, match="the weight is shared by 2 modules"):
        get_peft_model(model.unload(), config(mode="inplace", layout="gather"))
    assert_same(base_state(model.base_model.model), original)


class Unknown(nn.Module):
    """A model of a type that the coupling table lacks."""

    def __init__(self, down):
        super().__init__()
        self.config = type("Config", (), {"model_type": "unheard_of"})()
        self.up = nn.Linear(12, 24)
        self.down = down

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("down", (nn.Linear(24, 12), Conv1D(12, 24)), ids=("Linear", "Conv1D"))
def test_an_unknown_model_type_is_refused_except_for_gather(down):
    model = Unknown(down)
    for layout in ("auto", "permute", "block"):
        with pytest.raises(ValueError, match="'unheard_of' is not in the coupling table"):
            get_peft_model(model, config(target_modules=["down"], layout=layout))
    assert model.down is down
    x = torch.randn(5, 12)
    want = model(x)
    model = get_peft_model(model, config(target_modules=["down"], layout="gather", channels=5))
    assert torch.equal(model(x), want)
    model(x).square().sum().backward()
    (delta,) = deltas(model).values()
    assert delta.shape == (12, 5) and delta.grad.abs().sum() > 0
