"""What no method makes an adapter of: nothing has changed then."""

from functools import partial

import pytest
import s2ft_models
import spiel_models
import torch
from accelerate import cpu_offload
from adapter_models import randomized
from model_states import assert_same, base_state
from peft import get_peft_model
from tiny_models import tiny_model, token_ids

from s2kernels.peft import S2FTConfig, SpIELConfig

IDS = token_ids()
WIDE = s2ft_models.WIDE
METHODS = {
    "s2ft": s2ft_models.config,
    "s2ft gathered": partial(s2ft_models.config, layout="gather"),
    "spiel": spiel_models.config,
}


def one_layer_offloaded():
    model = tiny_model("llama", torch.float32, **WIDE)
    cpu_offload(model.model.layers[1].mlp.down_proj, execution_device="cpu")
    return model


def experts_offloaded():
    model = tiny_model("mixtral", torch.float32, **WIDE)
    cpu_offload(model.model.layers[1].mlp, execution_device="cpu")
    return model


def partitioned():
    """As DeepSpeed ZeRO-3 leaves the parameters of a module outside of its forward."""
    model = tiny_model("llama", torch.float32, **WIDE)
    for i, value in enumerate(model.parameters()):
        value.ds_id, value.data = i, torch.empty(0)
    return model


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (one_layer_offloaded, "layers.1.mlp.down_proj cannot be trained: accelerate has offloaded"),
        (experts_offloaded, "1.mlp.experts.down_proj cannot be trained: accelerate has offloaded"),
        (partitioned, "partitioned by DeepSpeed ZeRO-3"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_elsewhere_are_refused(method, base, message):
    config, model = METHODS[method], base()
    if method == "spiel" and base is experts_offloaded:
        pytest.skip("SpIEL trains no experts")
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config())
    assert {name: id(module) for name, module in model.named_modules()} == modules
    if base is one_layer_offloaded:  # what is not trained may be elsewhere
        want = model(IDS).logits
        model = get_peft_model(model, config(target_modules=["o_proj"]))
        assert torch.allclose(model(IDS).logits, want, rtol=0, atol=1e-5)
        assert not torch.allclose(randomized(model)(IDS).logits, want, rtol=0, atol=1e-2)


# of a model, by the method: fields that go with no model, or not with this one
CONVERSIONS = {
    "s2ft": [
        (dict(heads=9), ValueError, "heads: 9 wanted of 8"),
        (dict(channels=0), ValueError, "channels: 0 wanted"),
        (dict(channels=1.5), ValueError, "channels: 1.5 wanted"),
        (dict(heads=0.0), ValueError, "heads: 0.0 wanted"),
        (dict(heads=True), TypeError, "heads: a count"),
        (dict(target_modules=["o_proj", "mlp"]), TypeError, "must name linear layers"),
        (dict(target_modules=["o_proj", "lm_head"]), ValueError, "lm_head is not in the coupling"),
        (dict(target_modules=["c_attn"]), ValueError, "not found in the base model"),
        (
            dict(heads=3, seed=1, layout="permute"),
            ValueError,
            "more than two partly selected KV groups",
        ),
        (dict(channels=200, layout="block"), ValueError, "channels"),
    ],
    "spiel": [
        (dict(num_tunable_weights=10**6), ValueError, "must not exceed"),
        (dict(target_modules=["mlp"]), TypeError, "0.mlp is a LlamaMLP"),
        (dict(target_modules=["c_attn"]), ValueError, "not found in the base model"),
    ],
}


@pytest.mark.parametrize(
    ("method", "fields", "error", "message"),
    [(method, *case) for method, cases in CONVERSIONS.items() for case in cases],
)
def test_a_failed_conversion_leaves_the_model_as_it_was(method, fields, error, message):
    model = tiny_model("llama", **WIDE)
    model.lm_head.requires_grad_(False)
    modules = {name: id(module) for name, module in model.named_modules()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    original, logits = base_state(model), model(IDS).logits
    with pytest.raises(error, match=message):
        get_peft_model(model, METHODS[method](**fields))
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert_same(base_state(model), original)
    assert torch.equal(model(IDS).logits, logits)
    assert not model._forward_pre_hooks and not model._state_dict_pre_hooks


EITHER = [
    (dict(mode="fast"), "mode must be one of"),
    (dict(target_modules=".*o_proj", layers_to_transform=0), "layers_to_transform does not go"),
    (dict(target_modules=".*o_proj", layers_pattern="h"), "layers_pattern does not go with"),
    (dict(layers_pattern="layers"), "layers_pattern needs layers_to_transform"),
]
FIELDS = {
    S2FTConfig: [*EITHER, (dict(layout="dense"), "layout must be one of")],
    SpIELConfig: [
        *EITHER,
        (dict(selection="random"), "selection must be one of 'accumulated_gradient'"),
        (dict(replacement_schedule="steps"), "replacement_schedule must be one of"),
        (dict(delta_dtype="int8"), "delta_dtype must be one of"),
        (dict(density=0.0), r"density must be a float in \(0, 1\], got 0.0"),
        (dict(density=1), r"density must be a float in \(0, 1\], got 1"),
        (dict(num_tunable_weights=0), "num_tunable_weights must be an int of at least 1, got 0"),
        (dict(accumulation_steps=20), "less than reselection_steps, got 20 and 20"),
        (dict(initial_replacement_rate=2.0), r"initial_rate must lie in \[0, 1\]"),
    ],
}


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [(config, *case) for config, cases in FIELDS.items() for case in cases],
)
def test_config_refuses(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)
