"""The life of an adapter, and of several: switched, mixed in a batch, summed, merged, deleted."""

import copy

import pytest
import torch
from model_states import assert_same, base_state
from peft import PeftModel, get_peft_model
from s2ft_models import EVERY_PROJECTION, MODES, WIDE, config, deltas, randomized, train
from tiny_models import tiny_model, token_ids

from s2kernels.peft import S2FTLinear
from s2kernels.peft.s2ft.layer import S2FTLayer


@pytest.mark.parametrize("layout", ("permute", "gather"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_type", ("phi3", "gpt2", "gpt_neox", "bert", "qwen3_moe"))
def test_the_life_of_an_adapter_on_other_layouts_of_weights(model_type, mode, layout, tmp_path):
    """Fused, transposed, interleaved, named otherwise, beside experts: nothing is special."""
    ids = token_ids()
    base = tiny_model(model_type, **WIDE)
    original, logits = base_state(base), base(ids).logits
    targets = EVERY_PROJECTION.get(model_type, "all-linear")
    fields = dict(mode=mode, layout=layout, target_modules=targets)
    model = randomized(get_peft_model(base, config(**fields)))
    want = model(ids).logits.detach()
    assert (want - logits).abs().max() > 1e-3
    assert model.base_model.keeper.arrangement.moved == (layout == "permute")
    with model.disable_adapter():
        assert (model(ids).logits - logits).abs().max() <= 1e-12
    assert_same(base_state(model), original)
    model.merge_adapter()
    assert (model(ids).logits - want).abs().max() <= 1e-12
    model.unmerge_adapter()
    assert_same(base_state(model), original)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(model_type, **WIDE), tmp_path)
    assert (loaded(ids).logits - want).abs().max() <= 1e-12
    merged = loaded.merge_and_unload()
    assert (merged(ids).logits - want).abs().max() <= 1e-12
    assert type(merged) is type(base)
    assert_same(base_state(model.unload()), original)


@pytest.mark.parametrize("mode", ("auto", "additive"))
def test_several_adapters(mode, tmp_path):
    ids = token_ids()
    model = tiny_model("llama", **WIDE)
    original, logits = base_state(model), model(ids).logits
    model = randomized(get_peft_model(model, config(mode=mode)))
    first = model(ids).logits
    model.add_adapter("second", config(mode=mode, heads=3, channels=20, seed=9))
    assert torch.equal(model(ids).logits, first)

    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, delta in deltas(model).items():
            if name.endswith("second"):
                delta.copy_(torch.randn(delta.shape, generator=generator, dtype=delta.dtype))
    model.set_adapter("second")
    second = model(ids).logits
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)
    model.base_model.set_adapter(["default", "second"])
    both = model(ids).logits

    # both at once is the sum of the deltas: merge them one after the other
    model.merge_adapter(adapter_names=["default", "second"])
    assert (model(ids).logits - both).abs().max() < 1e-12
    assert (second - both).abs().max() > 1e-3
    model.unmerge_adapter()
    assert_same(base_state(model), original)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_model("llama", **WIDE), tmp_path / "second", adapter_name="second"
    )
    assert (loaded(ids).logits - second).abs().max() < 1e-12

    model.delete_adapter("default")
    assert (model(ids).logits - second).abs().max() < 1e-12
    with model.disable_adapter():
        assert (model(ids).logits - logits).abs().max() < 1e-12
    assert_same(base_state(model.unload()), original)


@pytest.mark.parametrize("model_type", ("llama", "mixtral"))
@pytest.mark.parametrize("mode", ("auto", "additive"))
def test_an_adapter_of_anothers_own_configuration_starts_as_its_copy(mode, model_type, tmp_path):
    """One of an equal configuration is a fresh adapter."""
    ids = token_ids()
    own = config(mode=mode, modules_to_save=["lm_head"])
    model = randomized(get_peft_model(tiny_model(model_type, **WIDE), own))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    layers = [module for module in model.modules() if isinstance(module, S2FTLayer)]
    for layer in layers:  # not what its configuration draws
        layer.s2ft_index["default"] = layer.num_channels - 1 - layer.s2ft_index["default"]
        layer.s2ft_fingerprint["default"].zero_()
    want = model(ids).logits.detach()
    model.add_adapter("ref", model.peft_config["default"])
    model.add_adapter("fresh", copy.copy(own))
    assert not any("ref" in name for name, p in model.named_parameters() if p.requires_grad)
    for layer in layers:
        assert torch.equal(layer.s2ft_fingerprint["ref"], layer.s2ft_fingerprint["default"])
    with torch.no_grad():
        for name, delta in deltas(model).items():
            delta.mul_(0.5 if name.endswith("default") else 1)
    model.set_adapter("ref")
    assert torch.equal(model(ids).logits, want)
    model.save_pretrained(tmp_path, selected_adapters=["ref"])
    loaded = PeftModel.from_pretrained(tiny_model(model_type, **WIDE), tmp_path / "ref")
    assert (loaded(ids).logits - want).abs().max() < 1e-12
    model.set_adapter("fresh")
    fresh = model(ids).logits
    model.delete_adapter("ref")
    assert torch.equal(model(ids).logits, fresh)
    assert (fresh - tiny_model(model_type, **WIDE)(ids).logits).abs().max() < 1e-12


@pytest.mark.parametrize("mode", ("auto", "additive"))
def test_a_mixed_batch_takes_an_adapter_for_each_row(mode):
    ids = token_ids(batch=5)
    model = get_peft_model(tiny_model("llama", **WIDE), config(mode=mode)).eval()
    original = base_state(model)
    model.add_adapter("second", config(mode=mode, heads=3, channels=20, seed=9))
    randomized(model)
    names = ["default", "__base__", "second", "default", "second"]
    rows = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(ids[row : row + 1]).logits)
        else:
            model.set_adapter(name)
            rows.append(model(ids[row : row + 1]).logits)
    mixed = model(input_ids=ids, adapter_names=names).logits
    assert (mixed - torch.cat(rows)).abs().max() < 1e-12
    assert (rows[0] - mixed[1]).abs().max() > 1e-3
    assert_same(base_state(model), original)

    options = dict(max_new_tokens=4, do_sample=False)
    together = model.generate(input_ids=ids, adapter_names=names, **options)
    model.set_adapter("second")
    assert torch.equal(together[2:3], model.generate(input_ids=ids[2:3], **options))
    beams = model.generate(input_ids=ids, adapter_names=names, num_beams=2, **options)
    assert torch.equal(beams[2:3], model.generate(input_ids=ids[2:3], num_beams=2, **options))

    with pytest.raises(ValueError, match="among .* got .'third'"):
        model(input_ids=ids, adapter_names=["third"] * 5)
    with pytest.raises(ValueError, match="each of the 5 rows"):
        model(input_ids=ids, adapter_names=["second"])
    with pytest.raises(ValueError, match="for inference"):
        model.train()(input_ids=ids, adapter_names=names)


@pytest.mark.parametrize("mode", ("auto", "additive"))
def test_a_weighted_adapter_is_the_exact_sum(mode, tmp_path):
    ids = token_ids()
    model = get_peft_model(tiny_model("llama", **WIDE), config(mode=mode))
    model.add_adapter("second", config(mode=mode, heads=5, channels=150, seed=9))
    randomized(model)
    model.add_weighted_adapter(["default", "second"], [2.0, -0.5], "sum")
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    union = set(layer.s2ft_index["default"].tolist()) | set(layer.s2ft_index["second"].tolist())
    assert layer.s2ft_index["sum"].tolist() == sorted(union) and len(union) < 64 + 150

    model.set_adapter("sum")
    got = model(ids).logits
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, S2FTLinear):
                module.s2ft_delta["default"].mul_(2.0)
                module.s2ft_delta["second"].mul_(-0.5)
    model.base_model.set_adapter(["default", "second"])
    assert (got - model(ids).logits).abs().max() < 1e-12
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny_model("llama", **WIDE), tmp_path / "sum")
    assert (loaded(ids).logits - got).abs().max() < 1e-12

    with pytest.raises(ValueError, match="got .'third'"):
        model.add_weighted_adapter(["third"], [1.0], "other")
    with pytest.raises(ValueError, match="exists already"):
        model.add_weighted_adapter(["second"], [1.0], "sum")


def test_no_weighted_adapter_is_made_of_whole_modules():
    ids = token_ids()
    own = config(modules_to_save=["lm_head"])
    model = randomized(get_peft_model(tiny_model("llama", **WIDE), own))
    model.add_adapter("second", config(seed=9))
    want = model(ids).logits
    for adapters in (["default"], ["second", "default"]):
        with pytest.raises(ValueError, match="whole: lm_head is in .* of default"):
            model.add_weighted_adapter(adapters, [0.5] * len(adapters), "sum")
    assert set(model.peft_config) == {"default", "second"}
    assert torch.equal(model(ids).logits, want)
    model.add_weighted_adapter(["second"], [0.5], "sum")


def test_inplace_wants_exactly_one_active_adapter():
    model = get_peft_model(tiny_model("llama", **WIDE), config(mode="inplace"))
    model.add_adapter("second", config(seed=9))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="exactly one active adapter"):
        model(token_ids())


def test_a_failed_second_adapter_leaves_the_first_one_working():
    ids = token_ids()
    model = randomized(get_peft_model(tiny_model("llama", **WIDE), config()))
    want = model(ids).logits
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match="heads: 9 wanted"):
        model.add_adapter("second", config(heads=9))
    assert set(model.peft_config) == {"default"}
    assert set(model.state_dict()) == keys
    assert torch.equal(model(ids).logits, want)
    assert train(model.train(), steps=3)


def test_a_copy_of_less_than_the_adapter_is_refused():
    ids = token_ids()
    model = randomized(get_peft_model(tiny_model("llama", **WIDE), config()))
    want = model(ids).logits
    model.peft_config["default"].target_modules = {"o_proj"}
    with pytest.raises(ValueError, match="cannot start as a copy of 'default'.*layers.1.mlp.down"):
        model.add_adapter("ref", model.peft_config["default"])
    assert set(model.peft_config) == {"default"}
    assert torch.equal(model(ids).logits, want)
