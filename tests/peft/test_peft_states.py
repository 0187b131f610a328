"""Interruptions, odd orders and odd places: the base weights are never wrong and never lost."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import adapter_models
import pytest
import torch
from model_states import assert_same, base_state
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, peft_model
from s2ft_models import WIDE, config, deltas, randomized
from safetensors.torch import load_file
from tiny_models import tiny_model, token_ids
from torch import nn

from s2kernels.peft import S2FTConfig, S2FTLinear, SpIELConfig, save_pretrained
from s2kernels.peft.s2ft import arranged_weights

IDS = token_ids()


def wrapped(model=None, **fields):
    model = tiny_model("llama", **WIDE) if model is None else model
    return randomized(get_peft_model(model, config(**fields)))


@pytest.mark.parametrize("fail_at", ("weights", "configuration"))
def test_a_save_that_fails_leaves_what_was_there(fail_at, tmp_path, monkeypatch):
    model = wrapped()
    model.add_adapter("second", config(seed=9))
    save_pretrained(model, tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\n## Mine\n\nkept\n")
    save_pretrained(model, tmp_path)
    assert card.read_text().count("## S2FT adapter") == 1 and "kept" in card.read_text()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.parent.name for path in before} == {tmp_path.name, "second"}

    def half(tensors, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    def later(self, folder, **kwargs):
        raise KeyboardInterrupt

    with torch.no_grad():
        deltas(model)[next(iter(deltas(model)))].add_(1)
    with monkeypatch.context() as patch:
        if fail_at == "weights":
            patch.setattr(peft_model, "safe_save_file", half)
        else:
            patch.setattr(S2FTConfig, "save_pretrained", later)
        with pytest.raises((OSError, KeyboardInterrupt)):
            save_pretrained(model, tmp_path)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    save_pretrained(model, tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(tiny_model("llama", **WIDE), tmp_path)
    assert (loaded(IDS).logits - model(IDS).logits).abs().max() < 1e-12
    with pytest.raises(ValueError, match="README.md is a file"):
        save_pretrained(model, card)


def test_a_mixed_batch_takes_the_saved_module_of_each_row():
    model = wrapped(modules_to_save=["lm_head"]).eval()
    model.add_adapter("second", config(seed=9, modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head.modules_to_save" in name or "s2ft_delta.second" in name:
                parameter.normal_()
    rows = []
    for row, name in enumerate(("default", "second")):
        model.set_adapter(name)
        rows.append(model(IDS[row : row + 1]).logits)
    mixed = model(input_ids=IDS, adapter_names=["default", "second"]).logits
    assert (mixed - torch.cat(rows)).abs().max() < 1e-12
    assert (rows[0] - model(IDS[:1]).logits).abs().max() > 1e-3


@pytest.mark.parametrize("when", ("release", "engage"))
def test_a_failure_half_way_leaves_no_stale_positions(when, monkeypatch):
    model = wrapped(layout="permute")
    original = base_state(tiny_model("llama", **WIDE))
    want = model(IDS).logits.detach()  # or its backward is to come, and nothing is moved
    name = "undo_" if when == "release" else "apply_"
    if when == "engage":
        model.state_dict()
    real, calls = getattr(arranged_weights, name), []

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(arranged_weights, name, fail_at_the_second)
        with pytest.raises(torch.OutOfMemoryError):
            model.state_dict() if when == "release" else model(IDS)
    assert (model(IDS).logits - want).abs().max() < 1e-12
    assert_same(base_state(model), original)


def test_what_became_an_obstacle_later_does_not_keep_the_weights():
    model = wrapped(layout="permute")
    original = base_state(tiny_model("llama", **WIDE))
    model(IDS)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model.base_model.model, "lora")
    left = {name: value for name, value in base_state(model).items() if "lora" not in name}
    assert_same(left, original)


def test_a_deep_copy_knows_which_weights_are_shared():
    model = tiny_model("llama", **WIDE)
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    model = wrapped(model)
    want = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, want)


def test_unload_gives_w0_back_even_if_merged():
    model = wrapped()
    model.merge_adapter()
    assert_same(base_state(model.unload()), base_state(tiny_model("llama", **WIDE)))


def test_fingerprints_are_those_of_w0(tmp_path):
    """The base is loaded after the adapter was made, which is one of that base from then on."""
    model = wrapped()
    other = base_state(tiny_model("llama", seed=4, **WIDE))
    state = {
        name: other[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        for name in model.state_dict()
        if "s2ft_" not in name
    }
    model.load_state_dict(state, strict=False)
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", seed=4, **WIDE), tmp_path)
    assert (loaded(IDS).logits - want).abs().max() < 1e-12


@pytest.mark.parametrize("layout", ("permute", "gather"))
@pytest.mark.parametrize("targets", (None, "all-linear"))
def test_a_state_dict_inside_a_forward_is_right_and_harmless(layout, targets, tmp_path):
    """As where a signal's handler saves: of the adapter alone, and of the whole model."""
    model = wrapped(layout=layout, target_modules=targets)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    want, states = model(IDS).logits, []

    def save(*args):
        states.append(model.state_dict())
        states.append(model.base_model.model.model.layers[1].state_dict())
        model.save_pretrained(tmp_path / "inside")

    hook = model.base_model.model.model.layers[0].register_forward_hook(save)
    output = model(input_ids=IDS, labels=IDS)
    assert (output.logits - want).abs().max() < 1e-12
    output.loss.backward()
    hook.remove()
    for name, value in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(value.grad, gradients[name])
    assert states[0].keys() == wanted.keys()
    if layout == "permute":  # else they are the weights themselves, which the forward goes on with
        assert all(torch.equal(states[0][name], value) for name, value in wanted.items())
        for name, value in states[1].items():
            assert torch.equal(value, wanted[f"base_model.model.model.layers.1.{name}"])
    files = [
        load_file(tmp_path / each / "adapter_model.safetensors") for each in ("before", "inside")
    ]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert (model(IDS).logits - want).abs().max() < 1e-12


def test_after_ctrl_c_nothing_is_stale():
    model = wrapped()

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.base_model.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    hook.remove()
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.mul_(-2)
    hidden = model.base_model.model.model(IDS).last_hidden_state
    copy.deepcopy(model)
    want = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    assert (hidden - want).abs().max() < 1e-12
    assert_same(base_state(model), base_state(tiny_model("llama", **WIDE)))


def test_the_default_device_does_not_matter():
    base = tiny_model("llama", **WIDE)
    with torch.device("meta"):
        model = get_peft_model(base, config())
    assert all(delta.device.type == "cpu" for delta in deltas(model).values())
    assert torch.isfinite(model(IDS).logits).all()


def test_a_model_made_in_inference_mode_serves_and_trains(tmp_path):
    model = wrapped()
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(tiny_model("llama", **WIDE), tmp_path)
        assert (loaded(IDS).logits - want).abs().max() < 1e-12
    made = tiny_model("llama", **WIDE)
    with torch.inference_mode():
        made = get_peft_model(made, config())
        made(IDS)
    made(input_ids=IDS, labels=IDS).loss.backward()
    assert all(delta.grad.abs().sum() > 0 for delta in deltas(made).values())


@pytest.mark.parametrize("layout", ("permute", "gather"))
def test_parts_of_the_model_have_the_weights_of_the_whole(layout):
    model = wrapped(layout=layout)
    want = tiny_model("llama", **WIDE).model.layers[1].state_dict()
    inner = model.base_model.model
    for part, prefix in ((inner.model, "layers.1."), (inner.model.layers[1], "")):
        model(IDS)
        state = base_state(SimpleNamespace(state_dict=part.state_dict))
        found = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        assert_same({name: found[name] for name in want}, want)
    for module in inner.modules():
        assert not isinstance(module, S2FTLinear) or module not in module.keeper.held_by_layer


SPIEL = SpIELConfig(density=0.02, seed=3)
MOVED = [("llama", config()), ("gpt2", config(channels=8)), ("mixtral", config()), ("llama", SPIEL)]


@pytest.mark.parametrize(("model_type", "config"), MOVED, ids=("llama", "gpt2", "mixtral", "spiel"))
@pytest.mark.parametrize("part", ("weight", "delta"))
def test_tensors_that_have_moved_in_memory_are_written_where_they_lie(part, model_type, config):
    """gpt2 stores its weights transposed; those of experts are written through views."""
    wide = {} if model_type == "gpt2" else WIDE
    model = adapter_models.randomized(get_peft_model(tiny_model(model_type, **wide), config)).eval()
    base = base_state(model)
    want = model(IDS).logits
    for layer in adapter_models.layers(model):
        moved = layer.weight if part == "weight" else layer.deltas["default"]
        before = moved.data
        moved.data = before.clone()
        before.fill_(float("nan"))
    assert torch.equal(model(IDS).logits, want)
    with torch.no_grad():
        for delta in adapter_models.deltas(model):
            delta.mul_(2)
    assert not torch.equal(model(IDS).logits, want)
    assert_same(base_state(model), base)


@pytest.mark.parametrize(
    "config", (config(), SpIELConfig(density=0.02, seed=3)), ids=("s2ft", "spiel")
)
def test_a_backward_among_forwards_of_the_base(config):
    """It writes the adapter that its forward had; the next forward wants the base."""
    model = get_peft_model(tiny_model("llama", **WIDE), config).eval()
    with torch.no_grad():
        for delta in (each for each in model.parameters() if each.requires_grad):
            delta.normal_()
    loss = model(input_ids=IDS, labels=IDS).loss
    with model.disable_adapter():
        want = model(IDS).logits
        for _ in range(2):
            loss.backward(retain_graph=True)
            assert torch.equal(model(IDS).logits, want)
    assert not torch.equal(model(IDS).logits, want)


def test_a_transform_of_torch_func_is_refused_and_leaves_the_model_usable():
    model = wrapped()
    base = base_state(tiny_model("llama", **WIDE))
    x = model.get_input_embeddings()(IDS).detach()
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda e: model(inputs_embeds=e).logits.square().mean())(x)
    assert torch.isfinite(model(IDS).logits).all()
    assert_same(base_state(model), base)


def test_what_calls_take_for_granted_does_not_pile_up():
    """Other tensors come with each call of a part of the model, which never looks as a whole."""
    model = wrapped(mode="additive").eval()
    inner, keeper = model.get_base_model().model, model.base_model.keeper
    facts = []
    for _ in range(4):
        others = {name: value.clone() for name, value in inner.named_parameters()}
        torch.func.functional_call(inner, others, (IDS,))
        facts.append(len(keeper._premises._same))
    assert facts[-1] == facts[1]


def test_an_unloaded_model_is_not_written_to_by_a_forward_that_others_have_wrapped():
    model = wrapped()
    base = base_state(tiny_model("llama", **WIDE))
    inner = model.base_model.model
    forward = inner.forward
    inner.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    model(IDS)
    plain = model.unload()
    plain(IDS)
    assert_same(base_state(plain), base)


def test_a_base_layer_alone_is_saved_and_loaded_as_w0():
    model = wrapped()
    layer = next(module for module in model.modules() if isinstance(module, S2FTLinear))
    w0 = layer.base_layer.weight.detach().clone()
    model(IDS)
    assert torch.equal(layer.base_layer.state_dict()["weight"], w0)
    model(IDS)
    layer.base_layer.load_state_dict({"weight": 2 * w0}, strict=False)
    model(IDS)
    assert torch.equal(layer.base_layer.state_dict()["weight"], 2 * w0)


@pytest.mark.parametrize("targets", (None, "all-linear"))
@torch.no_grad()
def test_a_part_that_is_called_before_channels_are_reordered_is_refused(targets):
    model = wrapped(mode="inplace", layout="permute", target_modules=targets).eval()
    inner = model.base_model.model.model
    with pytest.raises(RuntimeError, match="call the model before its parts"):
        inner(IDS)
    want = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(inner(IDS).last_hidden_state, want, rtol=0, atol=1e-12)
    model.state_dict()
    with pytest.raises(RuntimeError, match="call the model before its parts"):
        inner(IDS)


@pytest.mark.parametrize("config", (config(), SPIEL), ids=("s2ft", "spiel"))
def test_a_copy_takes_another_base_as_the_original_does(config):
    model = get_peft_model(tiny_model("llama", **WIDE), config)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = adapter_models.layers(copied)[0]
        other = nn.Parameter(layer.weight.detach() + 0.1, requires_grad=False)
        layer.base_layer.weight = other
        copied.state_dict()
        copied(IDS)
        assert layer.weight is other


def test_a_model_with_additive_adapters_alone_keeps_the_forward_of_its_class():
    """torch.export, replicas of DataParallel and accelerate's unwrapping expect it."""
    model = wrapped(mode="additive")
    assert "forward" not in vars(model.base_model.model)
    exported = torch.export.export(
        model.base_model.model, (IDS,), {"use_cache": False}, strict=False
    )
    want = model(IDS, use_cache=False).logits
    got = exported.module()(IDS, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
