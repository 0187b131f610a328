"""What is fused while adapters are added, disabled, merged, copied and saved."""

import copy
import io
import pickle

import pytest
import torch
from fused_models import EVERY_SETTING, adapted, assert_close, blocks, gradients, taken
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, token_ids
from transformers import AutoModelForCausalLM

from s2kernels.peft import S2FTConfig

pytestmark = pytest.mark.usefixtures("joined_as_on_a_gpu")


def test_disabled_merged_and_unloaded_it_is_the_forward_of_the_class(calls):
    ids = token_ids()
    base = tiny_model("llama")
    model = adapted()
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=1e-13)
    assert taken(calls) == 0
    want = model(ids).logits
    assert taken(calls) == 2
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-12)
    assert taken(calls) == 0
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, want)
    taken(calls)

    inner = model.unload()
    assert not any("forward" in vars(module) for module in inner.modules())
    torch.testing.assert_close(inner(ids).logits, base(ids).logits, rtol=0, atol=1e-13)
    state = inner.state_dict()
    for name, value in base.state_dict().items():
        assert torch.equal(state[name], value), name
    assert taken(calls) == 0


@pytest.mark.parametrize("mode", ("inplace", "additive"))
def test_a_delta_that_is_assigned_counts(mode):
    found = []
    for fuse in (True, False):
        model = adapted(mode=mode, fuse=fuse, target_modules=["down_proj"])
        before, _ = gradients(model)
        for block in blocks(model):
            deltas = block.mlp.down_proj.s2ft_delta
            deltas["default"] = torch.nn.Parameter(-2 * deltas["default"].detach())
        found.append(gradients(model))
        assert (found[-1][0] - before).abs() > 1e-6
    assert_close(*found)


def test_one_adapter_of_several(calls, tmp_path):
    model = adapted()
    want = {"default": gradients(model)}
    model.save_pretrained(tmp_path)
    taken(calls)
    model.add_adapter("second", S2FTConfig(heads=2, channels=5, seed=8))
    model.add_adapter("apart", S2FTConfig(heads=2, channels=5, seed=9, fuse=False))
    assert_close(gradients(model), want["default"])
    assert taken(calls) == 2
    model.set_adapter("second")
    gradients(model)
    assert taken(calls) == 2
    model.set_adapter("apart")
    gradients(model)
    assert taken(calls) == 0
    model.base_model.set_adapter(["default", "second"])
    gradients(model)
    assert taken(calls) == 0
    with torch.no_grad():
        names = ["default", "__base__"]
        mixed = model.eval()(token_ids(), adapter_names=names).logits
    assert taken(calls) == 0
    assert mixed.isfinite().all()
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].fuse is True
    assert_close(gradients(loaded), want["default"])
    assert taken(calls) == 2


@EVERY_SETTING
def test_copies_and_pickles(mode, layout, calls):
    model = adapted(mode=mode, layout=layout)
    want = gradients(model)
    taken(calls)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    twins.append(torch.load(file, weights_only=False))
    for twin in twins:
        assert_close(gradients(twin), want)
        assert taken(calls) == 2
        mlp = blocks(twin)[0].mlp
        assert mlp.forward.module is mlp
        assert mlp.forward.keeper is twin.base_model.keeper


def test_a_failed_second_adapter_leaves_the_first_one_fused(calls):
    model = adapted()
    want = gradients(model)
    taken(calls)
    with pytest.raises(ValueError, match="heads: 9 wanted"):
        model.add_adapter("second", S2FTConfig(heads=9))
    assert_close(gradients(model), want)
    assert taken(calls) == 2


def test_a_failed_conversion_leaves_no_forward_behind():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="more than two partly selected"):
        get_peft_model(model, S2FTConfig(heads=3, seed=1, layout="permute"))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("how", ("merge_and_unload", "unload"))
def test_the_base_is_saved_as_ever(how, tmp_path):
    ids = token_ids()
    model = getattr(adapted(dtype=torch.float32), how)()
    want = model(ids).logits
    model.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, want)
    save_file(model.state_dict(), tmp_path / "alone.safetensors")
    sizes = [(tmp_path / "alone.safetensors").stat().st_size]
    state = load_file(tmp_path / "alone.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert sizes[0] < 1.2 * sum(v.numel() * 4 for v in state.values())
