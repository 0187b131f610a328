"""Our tuners in a model that has another tuner's layers, or our own, already."""

import copy

import pytest
import torch
from adapter_models import EVERY_CONFIG, layers, randomized
from peft import IA3Config, LoraConfig, get_peft_model
from tiny_models import tiny_model, token_ids
from torch import nn

from s2kernels.peft import S2FTConfig, SpIELConfig

IDS = token_ids()
OTHERS = {
    "lora": lambda: LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False),
    "ia3": lambda: IA3Config(
        target_modules=["o_proj"], feedforward_modules=[], init_ia3_weights=False
    ),
    "s2ft": lambda: S2FTConfig(target_modules=["o_proj"]),
    "spiel": lambda: SpIELConfig(target_modules=["o_proj"]),
}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@EVERY_CONFIG
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("targets", (["o_proj"], "all-linear"))
def test_a_layer_that_another_tuner_has_is_refused(config, other, targets):
    """In its place, the adapter of the other one would be lost."""
    if config.__name__.lower().startswith(other):
        pytest.skip("the same tuner adds to its own layers")
    model = tiny_model("llama")
    model.add_adapter(OTHERS[other](), "other")
    before, names, want = state(model), [n for n, _ in model.named_modules()], model(IDS).logits
    with pytest.raises(ValueError, match=r"o_proj has an adapter of another method"):
        model.add_adapter(config(target_modules=targets), "ours")
    with pytest.raises(ValueError, match=r"o_proj has an adapter of another method"):
        get_peft_model(model, config(target_modules=["o_proj", "q_proj"]))
    assert list(model.peft_config) == ["other"]
    assert [n for n, _ in model.named_modules()] == names
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(model(IDS).logits, want)


@EVERY_CONFIG
def test_layers_beside_those_of_another_tuner(config):
    model = tiny_model("llama")
    model.add_adapter(OTHERS["lora"](), "other")
    want = model(IDS).logits
    model.add_adapter(config(target_modules=["down_proj", "up_proj"]), "ours")
    model.set_adapter(["other", "ours"])
    assert torch.equal(model(IDS).logits, want)
    randomized(model, "ours")(IDS).logits.square().sum().backward()
    trained = [name for name, value in model.named_parameters() if value.grad is not None]
    assert any("lora_A" in name for name in trained) and any("_delta" in name for name in trained)


@EVERY_CONFIG
@pytest.mark.parametrize("layout", ("gather", "permute"))
@pytest.mark.parametrize("forward_first", (False, True))
def test_another_tuner_on_top_of_ours(config, layout, forward_first):
    """Exactly the sum of both, in whatever order heads lie, and whatever was computed before."""
    fields = dict(layout=layout) if config is S2FTConfig else {}
    lora = LoraConfig(r=2, target_modules=["o_proj", "up_proj", "q_proj"], init_lora_weights=False)

    def add_lora(model):
        torch.manual_seed(3)
        model.add_adapter(lora, "lora")

    model = tiny_model("llama")
    model.add_adapter(config(**fields), "ours")
    randomized(model, "ours")
    if forward_first:
        model(IDS)
    add_lora(model)
    model.set_adapter(["ours", "lora"])
    if layout == "permute" and config is S2FTConfig:  # the LoRA is in the order of the checkpoint
        with pytest.raises(ValueError, match="layout='permute' cannot be had for .*: .*lora_"):
            model(IDS)
        base = tiny_model("llama").state_dict()
        for name, value in model.state_dict().items():
            own = name.replace(".base_layer", "")
            assert own not in base or torch.equal(value, base[own])
        return
    merged = tiny_model("llama")
    merged.add_adapter(config(**fields), "ours")
    randomized(merged, "ours")
    for layer in layers(merged):
        layer.merge()
        name, _, leaf = layer.name.rpartition(".")
        setattr(merged.get_submodule(name), leaf, layer.get_base_layer())
    add_lora(merged)
    torch.testing.assert_close(model(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize("layout", ("gather", "permute"))
def test_a_projection_that_is_replaced_after_a_forward(layout):
    model, base = (
        get_peft_model(tiny_model("llama"), S2FTConfig(layout=layout)),
        tiny_model("llama"),
    )
    model(IDS)
    old = base.model.layers[0].mlp.up_proj
    new = nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype).requires_grad_(False)
    for each in (model.get_base_model(), base):
        each.model.layers[0].mlp.up_proj = copy.deepcopy(new)
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits)


@EVERY_CONFIG
@pytest.mark.parametrize("name", ("default", "second"))
def test_get_peft_model_of_our_own_peft_model_is_refused(config, name):
    """`add_adapter` is the way; a second PeftModel around the first would have other names."""
    model = randomized(get_peft_model(tiny_model("llama"), config()))
    want, before = model(IDS).logits, state(model)
    with pytest.raises(ValueError, match="add_adapter"), pytest.warns(UserWarning):
        get_peft_model(model, config(seed=9), adapter_name=name)
    assert list(model.peft_config) == ["default"]
    after = state(model)
    assert after.keys() == before.keys()
    assert torch.equal(model(IDS).logits, want)
    model.add_adapter("second", config(seed=9))


@EVERY_CONFIG
def test_get_peft_model_of_the_peft_model_of_another_method(config):
    model = get_peft_model(tiny_model("llama"), OTHERS["lora"]())
    want = model(IDS).logits
    with pytest.warns(UserWarning, match="second time"):
        outer = get_peft_model(model, config(target_modules=["down_proj"]), adapter_name="ours")
    assert torch.equal(outer(IDS).logits, want)
    randomized(outer, "ours")
    assert not torch.equal(outer(IDS).logits, want)


def test_a_weight_that_is_trained_whole_in_a_permuted_block_is_refused():
    """Neither its gradient nor the optimizer's states would move along with it."""
    base = tiny_model("llama").state_dict()
    for unfrozen in ("gate_proj.weight", "up_proj.bias", "down_proj.base_layer.weight"):
        model = randomized(get_peft_model(tiny_model("llama"), S2FTConfig(layout="permute")))
        model(IDS)
        name = f"base_model.model.model.layers.1.mlp.{unfrozen}"
        model.get_parameter(name).requires_grad_()
        with pytest.raises(ValueError, match=r"layers.1.mlp: \w+.\w+ is trained whole"):
            model(IDS)
        for name, value in model.get_base_model().state_dict().items():
            own = name.replace(".base_layer", "")
            assert own not in base or torch.equal(value, base[own])
