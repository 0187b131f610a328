"""The model card of an adapter, of each method, with and without a card that is there."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_model, token_ids
from transformers import AutoModelForCausalLM

from s2kernels.peft import S2FTConfig, SpIELConfig, indices_of

CONFIGS = {
    "S2FT": (S2FTConfig, dict(heads=3, channels=0.2, seed=4)),
    "SpIEL": (SpIELConfig, dict(num_tunable_weights=1500, seed=4)),
}


def fill(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_delta" in name:
                parameter.normal_(std=0.3)


@pytest.mark.parametrize("method", CONFIGS)
def test_whoever_receives_an_adapter_can_load_it(method, tmp_path):
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    tiny_model("llama", torch.float32).save_pretrained(base_dir)
    kind, fields = CONFIGS[method]
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    model = get_peft_model(base, kind(task_type="CAUSAL_LM", **fields))
    fill(model)
    for _ in range(2):
        model.save_pretrained(adapter_dir)
    card = (adapter_dir / "README.md").read_text()
    assert card.count(f"## {method} adapter") == 1 and card.count("adapter\n\n") == 1
    assert "library_name: peft" in card and "## Model Details" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    assert "import s2kernels.peft" in snippet
    scope: dict = {}
    exec(snippet.replace("PATH OF THIS FOLDER", str(adapter_dir)), scope)
    ids = token_ids()
    assert torch.equal(scope["model"](ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (S2FTConfig(heads=3, seed=4), "(selection random, heads 3, channels 0.02, seed 4)"),
        (S2FTConfig(indices={"o_proj": [0]}), "(given by their indices)"),
        (S2FTConfig(selection="weight", indices={}, channels=7), "weight, heads 0.05, channels 7"),
        (S2FTConfig(scope="global", indices={}), "(selection random,"),
        (SpIELConfig(num_tunable_weights=1500), "(a budget of 1,500, selection accumulated_"),
        (SpIELConfig(density=0.25, seed=3), "(density 0.25, selection accumulated_gradient, seed"),
    ],
)
def test_the_card_says_what_was_trained(config, said, tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [mine]\n---\n# Title\n\nText.\n")
    config.save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert said in text
    assert "\n# Title\n\nText.\n" in text and "- mine\n" in text


def test_indices_that_the_draw_leaves_are_not_called_given(tmp_path):
    model = tiny_model("llama", torch.float32)
    config = S2FTConfig(heads=1, channels=2)
    chosen = indices_of(model, config, {"model.layers.0.mlp": torch.tensor([3, 1])})
    get_peft_model(model, config).save_pretrained(tmp_path / "drawn")
    assert "(selection random, heads 1" in (tmp_path / "drawn" / "README.md").read_text()
    given = S2FTConfig(heads=1, channels=2, indices=chosen)
    model = get_peft_model(tiny_model("llama", torch.float32), given)
    model.save_pretrained(tmp_path / "given")
    assert "(given by their indices)" in (tmp_path / "given" / "README.md").read_text()
