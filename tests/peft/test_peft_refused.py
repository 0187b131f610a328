"""An adapter that does not fit is refused: to who loads or uses it, and to nobody else."""

import pytest
import torch
from adapter_models import EVERY_CONFIG, deltas, layers, randomized
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from saved_adapters import TENSORS, without_digests
from tiny_models import tiny_model, token_ids

from s2kernels.peft import S2FTConfig, SpIELConfig

IDS = token_ids()
PREFIX = {S2FTConfig: "s2ft_", SpIELConfig: "spiel_"}


def saved_of_another_base(config, folder):
    other = tiny_model("llama")
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    randomized(get_peft_model(other, config())).save_pretrained(folder)
    return other


def saved_with_an_index_out_of_range(config, folder):
    randomized(get_peft_model(tiny_model("llama"), config())).save_pretrained(folder)
    tensors = load_file(folder / TENSORS)
    for name in tensors:
        if name.endswith("_index"):
            tensors[name][-1] = 2**31 - 1
    save_file(tensors, folder / TENSORS)
    without_digests(folder)


FAULTS = {"another base": saved_of_another_base, "must be below": saved_with_an_index_out_of_range}


@EVERY_CONFIG
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("low", (False, True))
def test_an_adapter_that_cannot_be_loaded_leaves_the_others_alone(config, fault, low, tmp_path):
    FAULTS[fault](config, tmp_path / "bad")
    model = randomized(get_peft_model(tiny_model("llama"), config())).eval()
    want = model(IDS).logits
    randomized(model, seed=8).save_pretrained(tmp_path / "good")
    good = model(IDS).logits
    randomized(model)
    with pytest.raises(ValueError):
        model.load_adapter(tmp_path / "bad", "bad", low_cpu_mem_usage=low)
    assert torch.equal(model(IDS).logits, want)
    model.load_adapter(tmp_path / "good", "good")  # nor does the next one mind
    assert torch.equal(model(IDS).logits, want)
    with pytest.raises(ValueError, match="adapter 'bad' cannot be used"):
        model.set_adapter("bad")
        model(IDS)
    with pytest.raises(ValueError, match="adapter 'bad' cannot be used"):
        model.merge_adapter(["bad"])
    model.set_adapter("good")
    torch.testing.assert_close(model(IDS).logits, good)
    model.delete_adapter("bad")
    model.load_adapter(tmp_path / "good", "bad")
    model.set_adapter("bad")
    torch.testing.assert_close(model(IDS).logits, good)


@EVERY_CONFIG
def test_a_refused_adapter_fits_again_with_its_own_base(config, tmp_path):
    other = saved_of_another_base(config, tmp_path)
    want = PeftModel.from_pretrained(other, tmp_path)(IDS).logits
    model = get_peft_model(tiny_model("llama"), config())
    with pytest.raises(ValueError, match="another base"):
        model.load_adapter(tmp_path, "bad")
    state = get_peft_model_state_dict(PeftModel.from_pretrained(other, tmp_path))
    with pytest.raises(ValueError, match="another base"):
        set_peft_model_state_dict(model, state, adapter_name="bad")
    with torch.no_grad():
        for layer in layers(model):
            layer.weight.mul_(1.5)
        rest = [p for name, p in model.named_parameters() if "_delta" not in name]
        known = {id(layer.weight) for layer in layers(model)}
        for weight in rest:
            if id(weight) not in known:
                weight.mul_(1.5)
    set_peft_model_state_dict(model, state, adapter_name="bad")
    model.set_adapter("bad")
    torch.testing.assert_close(model(IDS).logits, want)


def averaged(states, how):
    """As others average state_dicts: federated learning, checkpoints, model soups."""
    keys = states[0]
    if how == "numpy":  # by numbers of examples
        total = 17 * len(states)
        return {k: torch.as_tensor(sum(s[k].numpy() * 17 for s in states) / total) for k in keys}
    if how == "true division":
        return {k: sum(s[k] for s in states) / len(states) for k in keys}
    if how == "of the dtype before":
        mean = {k: torch.stack([s[k].float() for s in states]).mean(0) for k in keys}
        return {k: value.to(states[0][k].dtype) for k, value in mean.items()}
    return {
        k: sum(s[k] for s in states).div(len(states), rounding_mode="floor")
        if not states[0][k].is_floating_point()
        else sum(s[k] for s in states) / len(states)
        for k in keys
    }


@EVERY_CONFIG
@pytest.mark.parametrize("how", ("numpy", "true division", "of the dtype before", "floor"))
@pytest.mark.parametrize("low", (False, True))
def test_averages_of_adapters_are_loaded(config, how, low):
    states, means = [], []
    for seed in (1, 2, 3):
        model = randomized(get_peft_model(tiny_model("llama"), config()), seed=seed)
        states.append(get_peft_model_state_dict(model))
        means.append(deltas(model))
    average = averaged(states, how)
    model = get_peft_model(tiny_model("llama"), config())
    before = [layer.indices["default"].clone() for layer in layers(model)]
    result = set_peft_model_state_dict(model, average, low_cpu_mem_usage=low)
    assert not result.unexpected_keys
    model(IDS)
    for layer, index in zip(layers(model), before, strict=True):
        assert torch.equal(layer.indices["default"], index)
        assert layer.indices["default"].dtype == index.dtype
        assert layer.fingerprints["default"].dtype == torch.int64
    for delta, parts in zip(deltas(model), zip(*means, strict=True), strict=True):
        torch.testing.assert_close(delta, sum(parts) / 3)


@EVERY_CONFIG
def test_averages_of_adapters_that_train_different_entries_are_refused(config):
    states = [
        get_peft_model_state_dict(get_peft_model(tiny_model("llama"), config(seed=seed)))
        for seed in (1, 2)
    ]
    for how in ("true division", "floor"):
        model = get_peft_model(tiny_model("llama"), config())
        with pytest.raises(ValueError, match="must be whole numbers|another base|repeat|ascend"):
            set_peft_model_state_dict(model, averaged(states, how))


@EVERY_CONFIG
def test_an_average_of_another_base_is_refused(config, tmp_path):
    other = saved_of_another_base(config, tmp_path)
    state = get_peft_model_state_dict(PeftModel.from_pretrained(other, tmp_path))
    model = inject_adapter_in_model(config(), tiny_model("llama"))
    with pytest.raises(ValueError, match="another base"):
        set_peft_model_state_dict(model, averaged([state, state], "true division"))


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


@pytest.mark.slow
@EVERY_CONFIG
@pytest.mark.parametrize("forward_first", (False, True))
@pytest.mark.parametrize("strict", (False, True))
def test_torch_export_reads_merged_weights_and_refuses_written_ones(config, forward_first, strict):
    model = randomized(get_peft_model(tiny_model("llama", use_cache=False), config())).eval()
    fresh = randomized(get_peft_model(tiny_model("llama", use_cache=False), config())).eval()
    want = fresh(IDS).logits
    if forward_first:
        model(IDS)
    with pytest.raises(Exception, match="torch.export would read the weights without"):
        torch.export.export(Logits(model), (IDS,), strict=strict)
    assert torch.equal(model(IDS).logits, want)
    merged = model.merge_and_unload()
    exported = torch.export.export(Logits(merged), (IDS,), strict=strict).module()
    torch.testing.assert_close(exported(IDS), want)


def test_torch_export_of_an_additive_adapter():
    fields = dict(mode="additive", target_modules="all-linear")
    model = tiny_model("llama", use_cache=False)
    model = randomized(get_peft_model(model, S2FTConfig(**fields))).eval()
    want = model(IDS).logits
    exported = torch.export.export(Logits(model), (IDS,)).module()
    torch.testing.assert_close(exported(IDS), want)


@EVERY_CONFIG
def test_a_base_that_was_made_in_inference_mode(config):
    """Used within, and outside, where nothing can be written into such weights."""
    model = randomized(get_peft_model(tiny_model("llama"), config())).eval()
    want = model(IDS).logits
    with torch.inference_mode():
        other = randomized(get_peft_model(tiny_model("llama"), config())).eval()
        torch.testing.assert_close(other(IDS).logits, want)
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, want)
    with torch.inference_mode():
        torch.testing.assert_close(other(IDS).logits, want)


@pytest.mark.parametrize("indices", ({}, {"model.layers.0.mlp.down_proj": []}))
def test_no_indices_are_refused(indices):
    with pytest.raises(ValueError, match="must name at least one target|must be non-empty"):
        get_peft_model(tiny_model("llama"), S2FTConfig(indices=indices))


@EVERY_CONFIG
def test_a_shared_weight_that_cannot_be_merged_is_named_as_such(config):
    base = tiny_model("llama", tie_word_embeddings=True)
    fields = dict(layout="gather") if config is S2FTConfig else {}
    model = get_peft_model(base, config(target_modules=["lm_head"], **fields))
    with pytest.raises(ValueError, match="shared by 2 modules$"):
        model.merge_and_unload()
