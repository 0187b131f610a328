"""Adapters are saved and loaded in every way, and refused where they do not fit."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from s2ft_models import (
    COMBINATIONS,
    EVERY_COMBINATION,
    MODES,
    WIDE,
    config,
    deltas,
    indices,
    randomized,
    train,
)
from safetensors.torch import load_file
from tiny_models import tiny_model, token_ids
from transformers import AutoModelForCausalLM

from s2kernels.peft import S2FTLinear


@EVERY_COMBINATION
def test_an_adapter_travels_in_the_original_basis(mode, layout, tmp_path):
    ids = token_ids()
    fields = dict(mode=mode, layout=layout)
    model = randomized(get_peft_model(tiny_model("llama", **WIDE), config(**fields)))
    want = model(ids).logits.detach()
    chosen = indices(model)
    model.save_pretrained(tmp_path)

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 4 * len(chosen)
    for name, index in chosen.items():
        prefix = name.removesuffix("s2ft_delta.default")
        assert torch.equal(saved[prefix + "s2ft_index"], index)
        assert torch.equal(saved[prefix + "s2ft_delta"], deltas(model)[name])
        assert saved[prefix + "s2ft_dim"] == torch.tensor(1, dtype=torch.int32)

    for other_mode, other_layout in COMBINATIONS:
        loaded_config = PeftConfig.from_pretrained(tmp_path)
        loaded_config.mode, loaded_config.layout = other_mode, other_layout
        base = tiny_model("llama", **WIDE)
        loaded = PeftModel.from_pretrained(base, tmp_path, config=loaded_config)
        difference = (loaded(ids).logits - want).abs().max()
        assert difference <= 1e-12, (other_mode, other_layout)
        merged = loaded.merge_and_unload()
        assert not any(isinstance(module, S2FTLinear) for module in merged.modules())
        assert (merged(ids).logits - want).abs().max() <= 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_generate_and_the_ways_to_load(mode, tmp_path):
    ids = token_ids()
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    base = tiny_model("llama", torch.float32, **WIDE)
    base.save_pretrained(base_dir)
    base = type(base).from_pretrained(base_dir)
    model = randomized(get_peft_model(base, config(mode=mode, task_type="CAUSAL_LM")))
    want = model(ids).logits
    tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    model.save_pretrained(adapter_dir)
    assert json.loads((adapter_dir / "adapter_config.json").read_text())["peft_type"] == "S2FT"

    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter_dir)
    assert torch.equal(loaded(ids).logits, want)
    assert torch.equal(loaded.generate(input_ids=ids, max_new_tokens=6, do_sample=False), tokens)
    cheap = PeftModel.from_pretrained(
        type(base).from_pretrained(base_dir), adapter_dir, low_cpu_mem_usage=True
    )
    assert torch.equal(cheap(ids).logits, want)
    plain = type(base).from_pretrained(base_dir)
    plain.load_adapter(adapter_dir)
    assert torch.equal(plain(ids).logits, want)
    resumed = PeftModel.from_pretrained(
        type(base).from_pretrained(base_dir), adapter_dir, is_trainable=True
    )
    assert train(resumed.train(), steps=4)[-1] < train(resumed, steps=1)[0] + 1


def test_the_model_card_has_a_snippet_that_works(tmp_path):
    ids = token_ids()
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    tiny_model("llama", torch.float32, **WIDE).save_pretrained(base_dir)
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    model = randomized(get_peft_model(base, config(task_type="CAUSAL_LM")))
    for _ in range(2):
        model.save_pretrained(adapter_dir)
    card = (adapter_dir / "README.md").read_text()
    assert card.count("## S2FT adapter") == 1
    assert "- s2ft\n" in card and "arxiv:2412.06289" in card and "## Model Details" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(snippet.replace("PATH OF THIS FOLDER", str(adapter_dir)), scope)
    assert torch.equal(scope["model"](ids).logits, model(ids).logits)


def test_modules_to_save_are_trained_and_saved(tmp_path):
    ids = token_ids()
    model = get_peft_model(tiny_model("llama", **WIDE), config(modules_to_save=["lm_head"])).train()
    train(model, steps=2)
    want = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", **WIDE), tmp_path)
    assert (loaded(ids).logits - want).abs().max() < 1e-12


@EVERY_COMBINATION
def test_an_adapter_is_refused_on_another_base(mode, layout, tmp_path):
    """Whichever way it is loaded; and it is not where the base differs in dtype alone."""
    ids = token_ids()
    fields = dict(mode=mode, layout=layout, task_type="CAUSAL_LM")
    model = randomized(get_peft_model(tiny_model("llama", torch.float32, **WIDE), config(**fields)))
    model(ids)
    model.save_pretrained(tmp_path)

    other = tiny_model("llama", torch.float32, **WIDE)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    message = "model.layers.1.mlp.down_proj: the adapter was trained on another base"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    other.load_adapter(tmp_path)
    with pytest.raises(ValueError, match=message):
        other(ids)

    for dtype in (torch.float64, torch.bfloat16):
        loaded = PeftModel.from_pretrained(tiny_model("llama", dtype, **WIDE), tmp_path)
        assert (loaded(ids).logits - model(ids).logits).abs().max() < 0.5
    loaded.unload().float()


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_may_be_moved_between_loading_and_its_first_forward(mode, tmp_path):
    """transformers assigns the tensors, which the layers notice in their first forward: also that
    other channels are trained than the configuration draws, or that the base is another one.
    """
    ids = token_ids()
    fields = dict(mode=mode, task_type="CAUSAL_LM")
    model = randomized(get_peft_model(tiny_model("llama", torch.float32, **WIDE), config(**fields)))
    model.peft_config["default"].seed = 4
    model.save_pretrained(tmp_path)
    for move in (torch.nn.Module.double, torch.nn.Module.float):  # all buffers anew, and none
        want = move(copy.deepcopy(model))(ids).logits
        right, other = (tiny_model("llama", torch.float32, **WIDE) for _ in range(2))
        right.load_adapter(tmp_path)
        assert torch.equal(move(right)(ids).logits, want)
        with torch.no_grad():
            other.model.layers[1].mlp.down_proj.weight.mul_(1.01)
        other.load_adapter(tmp_path)
        move(other)
        with pytest.raises(ValueError, match="1.mlp.down_proj: the adapter was trained on another"):
            other(ids)


def test_other_channels_without_fingerprints_are_of_the_base_that_is_there():
    """Also where the model is moved before its first forward."""
    model = randomized(get_peft_model(tiny_model("llama", **WIDE), config()))
    want = []
    for seed in (3, 4):
        index = indices(get_peft_model(tiny_model("llama", **WIDE), config(seed=seed)))
        for layer in model.modules():
            if isinstance(layer, S2FTLinear):
                name = f"base_model.model.{layer.name}.s2ft_delta.default"
                layer.s2ft_index["default"] = index[name]
        logits = model.float().double()(token_ids()).logits
        want.append(logits)
    assert (want[0] - want[1]).abs().max() > 1e-3


def test_an_adapter_that_does_not_fit_is_refused_on_loading(tmp_path):
    model = get_peft_model(tiny_model("llama", **WIDE), config())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    name = next(name for name in state if "s2ft_index" in name)
    for change, message in (
        (lambda index: index + 500, "must lie in"),
        (lambda index: index * 0, "repeat"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(state | {name: change(state[name])})
    name = next(name for name in state if "s2ft_dim" in name)
    with pytest.raises(ValueError, match="s2ft_dim of adapter 'default' must be 1"):
        model.load_state_dict(state | {name: state[name] * 0})
    model.load_state_dict(state)
