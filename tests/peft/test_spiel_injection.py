"""What a configuration of SpIEL makes of a model, and what is refused before anything changes."""

import pytest
import torch
from accelerate import cpu_offload
from model_states import assert_same, base_state
from peft import get_peft_model, inject_adapter_in_model
from spiel_models import IDS, config, deltas, layers, randomized, train, wrapped
from tiny_models import tiny_model
from torch import nn

from s2kernels.peft import SpIELConfig
from s2kernels.peft.spiel.model import random_entries


def test_the_budget_is_split_in_proportion_and_drawn_at_random():
    model = tiny_model("llama")
    total = sum(p.numel() for p in model.parameters())
    sizes = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    model = get_peft_model(model, SpIELConfig(density=0.02, seed=4))
    num = int(0.02 * total)
    assert model.peft_config["default"].to_dict()["num_tunable_weights"] == num
    for layer in layers(model):
        want = num * sizes[layer.name] // sum(sizes.values())
        index = layer.spiel_index["default"]
        assert torch.equal(index, random_entries(4, layer.name, layer.shape, want))
        assert index.dtype == torch.int32 and len(index) == len(index.unique()) == want
        assert torch.equal(index, index.sort().values)
        assert layer.spiel_delta["default"].shape == (want,)
    assert {layer.name for layer in layers(model)} == set(sizes)
    assert model.get_nb_trainable_parameters()[0] == sum(len(delta) for delta in deltas(model))


def test_a_state_dict_decides_how_many_entries_each_target_trains():
    model = tiny_model("llama")
    o_proj = "model.layers.1.self_attn.o_proj"
    state = {f"{o_proj}.spiel_index": torch.arange(7, dtype=torch.int32)}
    model = inject_adapter_in_model(config(), model, state_dict=state)
    assert {layer.name: len(layer.spiel_delta["default"]) for layer in layers(model)} == {o_proj: 7}
    state = {f"{o_proj}.spiel_delta": torch.zeros(7)}
    with pytest.raises(ValueError, match=f"the state_dict has no {o_proj}.spiel_index"):
        inject_adapter_in_model(config(), tiny_model("llama"), state_dict=state)


def test_density_is_of_the_base_model_for_a_second_adapter_too():
    fields = dict(num_tunable_weights=None, density=0.01, modules_to_save=["lm_head"])
    model = wrapped(**fields)
    model.add_adapter("second", config(**fields))
    first, second = (model.peft_config[name].to_dict() for name in ("default", "second"))
    assert second["num_tunable_weights"] == first["num_tunable_weights"] > 0


def test_a_configuration_serves_several_models():
    reused = SpIELConfig()
    for model_type, reused.density in (("llama", 0.02), ("llama", 0.01), ("opt", 0.01)):
        model = get_peft_model(tiny_model(model_type), reused)
        fresh = SpIELConfig(density=reused.density)
        want = layers(get_peft_model(tiny_model(model_type), fresh))
        assert [layer.name for layer in layers(model)] == [layer.name for layer in want]
        assert [len(delta) for delta in deltas(model)] == [
            len(layer.spiel_delta["default"]) for layer in want
        ]
    assert (reused.target_modules, reused.num_tunable_weights) == ("all-linear", None)


@pytest.mark.parametrize("num", (1, 5, 30, 34, 35))
def test_random_entries_are_uniform(num):
    counts = torch.zeros(35)
    for seed in range(300):
        index = random_entries(seed, "name", (5, 7), num)
        assert len(index.unique()) == num
        counts[index.long()] += 1
    expected = 300 * num / 35
    spread = (expected * (1 - num / 35)) ** 0.5
    assert (counts - expected).abs().max() <= 4 * spread


def test_weights_that_are_elsewhere_are_refused():
    model = tiny_model("llama", torch.float32)
    cpu_offload(model.model.layers[1].mlp.down_proj, execution_device="cpu")
    with pytest.raises(ValueError, match="1.mlp.down_proj cannot be trained: accelerate has off"):
        wrapped(model)
    wrapped(model, target_modules=["o_proj"])(IDS)
    model = tiny_model("llama", torch.float32)
    for i, value in enumerate(model.parameters()):
        value.ds_id, value.data = i, torch.empty(0)
    with pytest.raises(ValueError, match="partitioned by DeepSpeed ZeRO-3"):
        wrapped(model)


def _refusals():
    return {
        "more than there are": (dict(num_tunable_weights=10**6), ValueError, "must not exceed"),
        "no linear layer": (dict(target_modules=["mlp"]), TypeError, "0.mlp is a LlamaMLP"),
        "no target": (dict(target_modules=["c_attn"]), ValueError, "not found in the base model"),
    }


@pytest.mark.parametrize("case", _refusals())
def test_a_failed_conversion_leaves_the_model_as_it_was(case):
    fields, error, message = _refusals()[case]
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    modules = {name: id(module) for name, module in model.named_modules()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    original = base_state(model)
    with pytest.raises(error, match=message):
        wrapped(model, **fields)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert_same(base_state(model), original)


def test_a_failed_second_adapter_leaves_the_first_one_working():
    model = randomized(wrapped())
    want = model(IDS).logits
    with pytest.raises(ValueError, match="must not exceed"):
        model.add_adapter("second", config(num_tunable_weights=10**6))
    assert set(model.peft_config) == {"default"}
    assert torch.equal(model(IDS).logits, want)
    assert train(model.train(), steps=3)


def test_layers_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="h.0.attn.c_attn is a Conv1D"):
        get_peft_model(tiny_model("gpt2"), config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(mode="fast"), "mode must be one of"),
        (dict(selection="random"), "selection must be one of 'accumulated_gradient'"),
        (dict(replacement_schedule="steps"), "replacement_schedule must be one of"),
        (dict(delta_dtype="int8"), "delta_dtype must be one of"),
        (dict(density=0.0), r"density must be a float in \(0, 1\], got 0.0"),
        (dict(density=1), r"density must be a float in \(0, 1\], got 1"),
        (dict(num_tunable_weights=0), "num_tunable_weights must be an int of at least 1, got 0"),
        (dict(accumulation_steps=20), "less than reselection_steps, got 20 and 20"),
        (dict(initial_replacement_rate=2.0), r"initial_rate must lie in \[0, 1\]"),
        (dict(target_modules=".*o_proj", layers_to_transform=0), "layers_to_transform does not go"),
        (dict(target_modules=".*o_proj", layers_pattern="h"), "layers_pattern does not go with"),
        (dict(layers_pattern="layers"), "layers_pattern needs layers_to_transform"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        SpIELConfig(**fields)
