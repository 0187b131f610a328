"""What is done between a forward and its backward, or between two forwards of one text."""

import warnings

import pytest
import torch
from adapter_models import EVERY_CONFIG, randomized
from model_states import assert_same, base_state
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from s2kernels.peft import S2FTConfig, SpIELConfig

IDS = token_ids(batch=3)
KINDS = {
    "permute": lambda **fields: S2FTConfig(layout="permute", heads=2, channels=0.2, **fields),
    "s2ft": lambda **fields: S2FTConfig(heads=2, channels=0.2, **fields),
    "spiel": lambda **fields: SpIELConfig(num_tunable_weights=400, **fields),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


@EVERY_KIND
@pytest.mark.parametrize("targets", (["down_proj", "o_proj"], "all-linear"))
@pytest.mark.parametrize("trained", ([], ["lm_head"]))
def test_an_adapter_is_saved_between_forward_and_backward(kind, targets, trained, tmp_path):
    """The gradients are as without, and what is saved is in the order of the checkpoint."""
    base = tiny_model("llama")
    original = base_state(base)
    config = KINDS[kind](target_modules=targets, modules_to_save=trained)
    model = randomized(get_peft_model(base, config)).train()
    gradients = []
    for save in (False, True):
        model.zero_grad()
        loss = loss_of(model)
        if save:
            saved = base_state(model)
            model.save_pretrained(tmp_path)
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(*gradients)
    assert_same(
        {name: saved[name] for name in original if name in saved},
        {name: value for name, value in original.items() if name in saved},
    )
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert (loss_of(loaded) - loss_of(model)).abs() < 1e-12
    assert_same(*map(base_state, (model, loaded)))


@pytest.mark.parametrize("kind", ("s2ft", "spiel"))
@pytest.mark.parametrize("how", ("modules_to_save", "unfrozen"))
def test_a_projection_that_is_trained_whole_beside_slices(kind, how):
    """Also where the weights are asked for between backward and step. layout="permute" refuses it:
    see test_peft_projections.
    """
    runs = []
    for fields, ask in ((dict(mode="additive"), False), (dict(mode="inplace"), True)):
        fields |= dict(fuse=ask) if kind == "s2ft" else {}
        whole = ["up_proj", "k_proj"] if how == "modules_to_save" else None
        config = KINDS[kind](
            target_modules=["down_proj", "o_proj"], modules_to_save=whole, **fields
        )
        model = get_peft_model(tiny_model("llama"), config).train()
        for name, value in model.named_parameters():
            if how == "unfrozen" and name.endswith(("up_proj.weight", "k_proj.weight")):
                value.requires_grad_()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        for _ in range(3):
            loss_of(model).backward()
            if ask:
                model.state_dict()
            optimizer.step()
            optimizer.zero_grad()
        runs.append({name: value.detach() for name, value in trained.items()})
    assert runs[0].keys() == runs[1].keys() and any("up_proj" in name for name in runs[0])
    for name, value in runs[0].items():
        assert (runs[1][name] - value).abs().max() < 1e-9, name


def mamba():
    sizes = dict(hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=48)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))


@pytest.mark.parametrize("kind", ("s2ft", "spiel"))
@pytest.mark.parametrize("mode", ("inplace", "additive"))
def test_a_trained_layer_that_is_not_called_is_noticed_once(kind, mode):
    """Mamba reads the weight of dt_proj, and does not call the layer."""
    fields = dict(layout="gather") if kind == "s2ft" else {}
    config = KINDS[kind](target_modules=["x_proj", "dt_proj"], mode=mode, **fields)
    model = get_peft_model(mamba(), config).train()
    with pytest.warns(UserWarning, match=r"layers.0.mixer.dt_proj, .* not called in the first"):
        loss_of(model).backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not called in the first")
        loss_of(model).backward()


@EVERY_KIND
def test_no_layer_that_is_called_is_missed(kind):
    model = get_peft_model(tiny_model("llama"), KINDS[kind](target_modules="all-linear"))
    model.add_adapter("idle", KINDS[kind](target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not called in the first")
        for name in ("default", "idle", "default"):
            model.set_adapter(name)
            for _ in range(3):
                (loss_of(model) + loss_of(model)).backward()


@pytest.mark.parametrize("change", ("merge", "delete", "add", "none"))
def test_a_cache_of_heads_in_another_order_is_refused(change):
    config = KINDS["permute"](target_modules=["o_proj"])
    model = randomized(get_peft_model(tiny_model("llama"), config))
    model.add_adapter("second", KINDS["s2ft"](target_modules=["o_proj"], seed=4))
    with torch.no_grad():
        want = model(IDS).logits
        if change == "add":
            model.delete_adapter("default")
        cache = model(IDS[:, :5]).past_key_values
        model.state_dict()
        if change == "merge":
            model.merge_adapter()
        elif change == "delete":
            model.delete_adapter("default")
        elif change == "add":
            model.add_adapter("third", KINDS["permute"](target_modules=["o_proj"]))
        else:
            rest = model(IDS[:, 5:], past_key_values=cache).logits
            assert (rest - want[:, 5:]).abs().max() < 1e-12
            return
        with pytest.raises(ValueError, match="the heads were in another order"):
            model(IDS[:, 5:], past_key_values=cache)
        again = model(IDS[:, :5]).past_key_values
        rest = model(IDS[:, 5:], past_key_values=again).logits
        assert (rest - model(IDS).logits[:, 5:]).abs().max() < 1e-12


@EVERY_CONFIG
@pytest.mark.parametrize("part", ("delta", "index", "fingerprint"))
def test_transformers_own_loading_notices_damage(config, part, tmp_path):
    base = tiny_model("llama", torch.float32)
    fields = dict(target_modules=["down_proj", "o_proj"], task_type="CAUSAL_LM")
    model = randomized(get_peft_model(base, config(**fields)))
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    fresh = tiny_model("llama", torch.float32)
    fresh.load_adapter(tmp_path)
    assert torch.equal(fresh(IDS).logits, want)

    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1" in name and name.endswith(part))
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors, path)
    damaged = tiny_model("llama", torch.float32)
    damaged.load_adapter(tmp_path)
    with pytest.raises(ValueError, match=f"damaged or incomplete: {name}: not as it was saved"):
        damaged(IDS)
    damaged.delete_adapter("default")
    assert torch.equal(damaged(IDS).logits, tiny_model("llama", torch.float32)(IDS).logits)
