"""The choice of modules is the same in every method's configuration."""

import pytest
from peft import PeftConfig, get_peft_model
from tiny_models import tiny_model

from s2kernels.peft import S2FTConfig, SpIELConfig

EVERY_CONFIG = pytest.mark.parametrize("config", (S2FTConfig, SpIELConfig))


@EVERY_CONFIG
def test_a_saved_choice_is_the_same_when_it_is_loaded(config, tmp_path):
    chosen = config(
        target_modules=["o_proj", "down_proj"],
        exclude_modules=["mlp"],
        layers_to_transform=[1],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
    )
    assert chosen.target_modules == {"o_proj", "down_proj"} and chosen.exclude_modules == {"mlp"}
    chosen.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is config and loaded.peft_type == chosen.peft_type
    assert loaded == chosen


@EVERY_CONFIG
def test_layers_and_exclusions_decide_what_is_trained(config):
    chosen = config(
        target_modules=["o_proj", "down_proj", "up_proj"],
        exclude_modules=["up_proj"],
        layers_to_transform=[1],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
    )
    model = get_peft_model(tiny_model("llama"), chosen)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    starts = {".".join(name.split(".")[2:-2]) for name in trained}
    assert starts == {
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head.modules_to_save",
    }


@EVERY_CONFIG
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(target_modules=".*o_proj", layers_to_transform=0), "got layers_to_transform=0"),
        (dict(target_modules=".*o_proj", layers_pattern="h"), "got layers_pattern='h'"),
        (dict(layers_pattern=["h"]), r"needs layers_to_transform, got \['h'\] alone"),
    ],
)
def test_layers_that_would_decide_nothing_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)
    config(target_modules="all-linear", layers_to_transform=0, layers_pattern="h")
