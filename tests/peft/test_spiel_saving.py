"""SpIEL adapters are saved and loaded in every way, and refused where they do not fit."""

import copy

import pytest
import torch
from model_states import assert_same, base_state
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file
from spiel_models import EVERY_MODE, IDS, MODES, layers, randomized, train, wrapped
from tiny_models import tiny_model


@EVERY_MODE
def test_an_adapter_travels(mode, tmp_path):
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    base = tiny_model("llama", torch.float32)
    base.save_pretrained(base_dir)
    base = type(base).from_pretrained(base_dir)
    fields = dict(mode=mode, reselection_steps=3, accumulation_steps=1, task_type="CAUSAL_LM")
    model = wrapped(base, **fields).train()
    train(model, steps=5)
    model.eval()
    want = model(IDS).logits
    model.save_pretrained(adapter_dir)

    saved = load_file(adapter_dir / "adapter_model.safetensors")
    assert len(saved) == 3 * 14
    for layer in layers(model):
        prefix = f"base_model.model.{layer.name}.spiel_"
        assert torch.equal(saved[prefix + "index"], layer.spiel_index["default"])
        assert torch.equal(saved[prefix + "delta"], layer.spiel_delta["default"])
        assert saved[prefix + "fingerprint"].shape == (1,)

    for other in MODES:
        loaded_config = PeftConfig.from_pretrained(adapter_dir)
        assert loaded_config.peft_type == "SPIEL"
        loaded_config.mode = other
        fresh = type(base).from_pretrained(base_dir)
        loaded = PeftModel.from_pretrained(fresh, adapter_dir, config=loaded_config)
        assert torch.equal(loaded(IDS).logits, want)
    auto = AutoPeftModelForCausalLM.from_pretrained(adapter_dir)
    assert torch.equal(auto(IDS).logits, want)
    cheap = PeftModel.from_pretrained(
        type(base).from_pretrained(base_dir), adapter_dir, low_cpu_mem_usage=True
    )
    assert torch.equal(cheap(IDS).logits, want)
    plain = type(base).from_pretrained(base_dir)
    plain.load_adapter(adapter_dir)
    assert torch.equal(plain(IDS).logits, want)


@EVERY_MODE
def test_an_adapter_is_refused_on_another_base(mode, tmp_path):
    """Also after a reselection; and it is not where the base differs in dtype alone."""
    fields = dict(mode=mode, reselection_steps=3, accumulation_steps=1, task_type="CAUSAL_LM")
    model = wrapped(tiny_model("llama", torch.float32), **fields).train()
    train(model, steps=5)
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    other = tiny_model("llama", torch.float32)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    message = "model.layers.1.mlp.down_proj: the adapter was trained on another base"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    other.load_adapter(tmp_path)
    with pytest.raises(ValueError, match=message):
        other(IDS)
    loaded = PeftModel.from_pretrained(tiny_model("llama", torch.float64), tmp_path)
    assert (loaded(IDS).logits - want).abs().max() < 1e-3


@EVERY_MODE
def test_an_adapter_may_be_moved_between_loading_and_its_first_forward(mode, tmp_path):
    """transformers assigns the tensors, which the layers notice in their first forward."""
    base = tiny_model("llama", torch.float32)
    model = randomized(wrapped(base, mode=mode, task_type="CAUSAL_LM"))
    model.peft_config["default"].seed = 4
    model.save_pretrained(tmp_path)
    for move in (torch.nn.Module.double, torch.nn.Module.float):  # all buffers anew, and none
        want = move(copy.deepcopy(model))(IDS).logits
        right, other = (tiny_model("llama", torch.float32) for _ in range(2))
        right.load_adapter(tmp_path)
        assert torch.equal(move(right)(IDS).logits, want)
        with torch.no_grad():
            other.model.layers[1].mlp.down_proj.weight.mul_(1.01)
        other.load_adapter(tmp_path)
        move(other)
        with pytest.raises(ValueError, match="1.mlp.down_proj: the adapter was trained on another"):
            other(IDS)


def test_positions_that_do_not_fit_are_refused_on_loading():
    model = wrapped()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    name = next(name for name in state if "spiel_index" in name)
    repeated = state[name].clone()
    repeated[1] = repeated[0]
    for change, error, message in (
        (repeated, ValueError, "must ascend without repeating a position"),
        (state[name].flip(0), ValueError, "must ascend"),
        (state[name] + 5000, ValueError, "must lie in"),
    ):
        with pytest.raises(error, match=f"q_proj: spiel_index of adapter 'default' {message}"):
            model.load_state_dict(state | {name: change})
    model.load_state_dict(state)
    assert torch.isfinite(model(IDS).logits).all()


def test_nothing_is_loaded_over_merged_weights():
    model = tiny_model("llama", torch.float32)
    original = base_state(model)
    model = randomized(wrapped(model))
    model.merge_adapter()
    merged = base_state(model)
    with pytest.raises(RuntimeError, match="unmerge_adapter first"):
        model.load_state_dict(model.state_dict())
    assert_same(base_state(model), merged)
    model.unmerge_adapter()
    assert_same(base_state(model), original)
