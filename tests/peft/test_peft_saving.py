"""S2FT adapters are saved in the order of the checkpoint, and loaded in any other."""

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from s2ft_models import (
    COMBINATIONS,
    EVERY_COMBINATION,
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
