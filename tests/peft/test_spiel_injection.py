"""What a configuration of SpIEL makes of a model, and what is refused before anything changes."""

import pytest
import torch
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
