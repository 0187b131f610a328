"""What holds of both tuners, in every mode and layout: the base is never lost, adapters travel."""

import copy
import json

import pytest
import torch
from adapter_models import (
    EVERY_CONFIG,
    EVERY_WAY,
    MODES,
    WAYS,
    deltas,
    layers,
    randomized,
    train,
)
from model_states import assert_same, base_state
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from s2ft_models import WIDE
from safetensors.torch import load_file
from tiny_models import tiny_model, token_ids

from s2kernels.peft import SpIELConfig

IDS = token_ids(batch=3)
IN_THE_ORDER = ("s2ft-inplace-gather", "s2ft-additive-gather", "spiel-inplace", "spiel-additive")
EVERY_MODE = pytest.mark.parametrize(
    "config", [WAYS[name] for name in IN_THE_ORDER], ids=IN_THE_ORDER
)
INPLACE = [name for name in WAYS if "inplace" in name]


def llama(dtype=torch.float32):
    return tiny_model("llama", dtype, **WIDE)


def is_spiel(config):
    return isinstance(config(), SpIELConfig)


def is_permuted(config):
    return getattr(config(), "layout", None) == "permute"


@EVERY_WAY
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_base_comes_back_bit_for_bit(dtype, config):
    """Of SpIEL, also after a reselection."""
    model = llama(dtype)
    original, logits = base_state(model), model(IDS).logits
    model = get_peft_model(model, config()).train()
    assert {delta.dtype for delta in deltas(model)} == {torch.float32}
    train(model, steps=5)

    with model.disable_adapter():
        error = (model(IDS).logits - logits).abs().max()
        assert error <= (32 * torch.finfo(dtype).eps if is_permuted(config) else 0)
        assert_same(base_state(model), original)
    trained = model(IDS).logits.detach()
    assert not torch.equal(trained, logits)
    assert_same(base_state(model), original)
    assert torch.equal(model(IDS).logits, trained)

    model.merge_adapter()
    if is_spiel(config):
        assert torch.equal(model(IDS).logits, trained)
    merged = base_state(model)
    for layer in layers(model):
        now, before = merged[f"{layer.name}.weight"], original[f"{layer.name}.weight"]
        untrained = layer.get_delta_weight("default") == 0
        assert torch.equal(now[untrained], before[untrained]) and not torch.equal(now, before)
    model.unmerge_adapter()
    assert_same(base_state(model), original)
    assert torch.equal(model(IDS).logits, trained)

    base = copy.deepcopy(model).merge_and_unload()
    assert_same(base_state(base), merged)
    assert not layers(base)
    base = model.unload()
    assert_same(base_state(base), original)
    assert torch.equal(base(IDS).logits, logits)
    assert not base._forward_pre_hooks and not base._forward_hooks
    assert not hasattr(base, "_ddp_params_and_buffers_to_ignore")


@pytest.mark.parametrize("config", [WAYS[name] for name in INPLACE], ids=INPLACE)
def test_an_exception_in_a_forward_restores_the_base(config):
    model = llama()
    original = base_state(model)
    model = randomized(get_peft_model(model, config()))
    want = model(IDS).logits.detach()

    def fail(module, args):
        raise KeyError("in the middle")

    block = model.base_model.model.model.layers[1]
    for target in (block.self_attn, block.mlp.down_proj):
        hook = target.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="in the middle"):
            model(IDS)
        hook.remove()
        assert not any(layer in layer.keeper.held_by_layer for layer in layers(model))
        if not is_permuted(config):  # the raw weights are then in the original basis, too
            raw = [p for name, p in model.named_parameters() if "_delta." not in name]
            assert all(torch.equal(*pair) for pair in zip(raw, original.values(), strict=True))
        assert_same(base_state(model), original)
        assert torch.equal(model(IDS).logits, want)


@EVERY_WAY
def test_a_deep_copy_trains_apart(config):
    model = get_peft_model(llama(torch.float64), config()).train()
    train(model, steps=2)
    before = model(IDS).logits.detach()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, before)
    losses = train(twin, steps=5)
    assert losses[-1] < losses[0]
    assert not torch.equal(twin(IDS).logits, before)
    assert torch.equal(model(IDS).logits, before)
    assert_same(base_state(twin), base_state(model))


@EVERY_WAY
def test_a_change_of_dtype_keeps_what_is_trained_in_place(config):
    for dtype, error in ((torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.01)):
        model = llama()
        original = {name: value.to(dtype) for name, value in base_state(model).items()}
        model = randomized(get_peft_model(model, config()))
        want = model(IDS).logits.detach()
        model.to(dtype)
        assert (model(IDS).logits - want).abs().max() < error
        assert_same(base_state(model), original)


@EVERY_WAY
def test_safe_merge_looks_at_what_the_weight_would_hold(config):
    model = llama(torch.float16)
    original = base_state(model)
    model = get_peft_model(model, config())
    with torch.no_grad():
        for delta in deltas(model):
            delta.fill_(1e5)  # fp32 holds the sum, fp16 does not
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert_same(base_state(model), original)


@EVERY_CONFIG
def test_nothing_is_loaded_over_merged_weights(config):
    model = randomized(get_peft_model(llama(), config()))
    model.merge_adapter()
    merged = base_state(model)
    with pytest.raises(RuntimeError, match="unmerge_adapter first"):
        model.load_state_dict(model.state_dict())
    assert_same(base_state(model), merged)
    model.unmerge_adapter()
    assert_same(base_state(model), base_state(llama()))


@EVERY_WAY
def test_a_disabled_pass_between_forward_and_backward_changes_no_gradient(config):
    """As DPO does: policy forward, reference forward with the adapter off, backward."""
    base = llama(torch.float64)
    reference = base(IDS).logits
    model = randomized(get_peft_model(base, config(target_modules="all-linear")))

    def loss():
        model.zero_grad()
        return model(input_ids=IDS, labels=IDS).loss

    def disturb_and_leave():
        with model.disable_adapter(), torch.no_grad():
            assert (model(IDS).logits - reference).abs().max() <= 1e-12

    loss().backward()
    want = [delta.grad.clone() for delta in deltas(model)]
    for disturb in (disturb_and_leave, model.base_model.keeper.restore):
        disturbed = loss()
        disturb()
        disturbed.backward()
        for delta, grad in zip(deltas(model), want, strict=True):
            torch.testing.assert_close(delta.grad, grad, rtol=0, atol=1e-14)

    # a backward while the adapter is off; what is off stays off
    disturbed = loss()
    with model.disable_adapter():
        for delta in deltas(model):
            delta.requires_grad_(True)
        grads = torch.autograd.grad(disturbed, deltas(model))
        assert (model(IDS).logits - reference).abs().max() <= 1e-12
    for grad, wanted in zip(grads, want, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-14)


@EVERY_MODE
@pytest.mark.parametrize("how", ("unload", "merge_adapter"))
def test_a_backward_after_merge_or_unload_changes_nothing(how, config):
    if how == "unload" and config().mode == "additive":
        pytest.skip("the backward of additive mode reads nothing that unload changes")
    model = randomized(get_peft_model(llama(), config()))
    loss = model(input_ids=IDS, labels=IDS).loss
    base = getattr(model, how)()
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()
    if how == "merge_adapter":
        model.unmerge_adapter()
    assert_same(base_state(base or model), base_state(llama()))


@EVERY_CONFIG
def test_data_parallel_is_refused(config):
    replica = get_peft_model(llama(), config()).base_model.model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        replica(IDS)


class SumOfSquares(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(8, 6, dtype=torch.float64)

    def forward(self, x):
        return self.fc(x).square().sum()


@EVERY_MODE
def test_a_model_may_return_a_single_number(config):
    budget = dict(num_tunable_weights=9) if is_spiel(config) else dict(channels=2)
    model = SumOfSquares()
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = randomized(get_peft_model(model, config(target_modules=["fc"], **budget)))
    (layer,) = layers(model)
    weight = (layer.weight + layer.get_delta_weight("default")).detach()
    want = torch.nn.functional.linear(x, weight, layer.bias).square().sum()
    torch.testing.assert_close(model(x).detach(), want, rtol=1e-12, atol=0)


# Adapters on their way


@EVERY_MODE
def test_an_adapter_travels(config, tmp_path):
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    llama().save_pretrained(base_dir)

    def base():
        return type(llama()).from_pretrained(base_dir)

    model = randomized(get_peft_model(base(), config(task_type="CAUSAL_LM"))).train()
    train(model, steps=5)
    model.eval()
    want = model(IDS).logits
    generation = dict(input_ids=IDS, max_new_tokens=6, do_sample=False)
    tokens = model.generate(**generation)
    model.save_pretrained(adapter_dir)

    saved = load_file(adapter_dir / "adapter_model.safetensors")
    for layer in layers(model):
        prefix = f"base_model.model.{layer.name}."
        assert torch.equal(saved.pop(prefix + layer.delta_name), layer.deltas["default"])
        assert torch.equal(saved.pop(prefix + layer.index_name), layer.indices["default"])
        assert saved.pop(prefix + layer.fingerprint_name).any()
        if not is_spiel(config):
            assert saved.pop(prefix + "s2ft_dim") == torch.tensor(1, dtype=torch.int32)
    assert not saved
    kind = json.loads((adapter_dir / "adapter_config.json").read_text())["peft_type"]
    assert kind == PeftConfig.from_pretrained(adapter_dir).peft_type == config().peft_type

    for mode in MODES:
        loaded_config = PeftConfig.from_pretrained(adapter_dir)
        loaded_config.mode = mode
        loaded = PeftModel.from_pretrained(base(), adapter_dir, config=loaded_config)
        error = (loaded(IDS).logits - want).abs().max()
        assert error <= (0 if mode == config().mode or is_spiel(config) else 1e-5)
    auto = AutoPeftModelForCausalLM.from_pretrained(adapter_dir)
    assert torch.equal(auto(IDS).logits, want)
    assert torch.equal(auto.generate(**generation), tokens)
    cheap = PeftModel.from_pretrained(base(), adapter_dir, low_cpu_mem_usage=True)
    assert torch.equal(cheap(IDS).logits, want)
    plain = base()
    plain.load_adapter(adapter_dir)
    assert torch.equal(plain(IDS).logits, want)
    resumed = PeftModel.from_pretrained(base(), adapter_dir, is_trainable=True).train()
    losses = train(resumed, steps=5)
    assert losses[-1] < losses[0]


@EVERY_WAY
def test_an_adapter_is_refused_on_another_base(config, tmp_path):
    """Whichever way it is loaded; and it is not where the base differs in dtype alone."""
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM")).train()
    train(model, steps=5)
    want = model(IDS).logits.detach()
    model.save_pretrained(tmp_path)

    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    message = "model.layers.1.mlp.down_proj: the adapter was trained on another base"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    other.load_adapter(tmp_path)
    with pytest.raises(ValueError, match=message):
        other(IDS)

    for dtype, error in ((torch.float64, 1e-3), (torch.bfloat16, 0.5)):
        loaded = PeftModel.from_pretrained(llama(dtype), tmp_path)
        assert (loaded(IDS).logits - want).abs().max() < error


@EVERY_MODE
def test_an_adapter_may_be_moved_between_loading_and_its_first_forward(config, tmp_path):
    """transformers assigns the tensors, which the layers notice in their first forward: also that
    others are trained than the configuration draws, or that the base is another one.
    """
    model = randomized(get_peft_model(llama(), config(task_type="CAUSAL_LM")))
    model.peft_config["default"].seed = 4
    model.save_pretrained(tmp_path)
    for move in (torch.nn.Module.double, torch.nn.Module.float):  # all buffers anew, and none
        want = move(copy.deepcopy(model))(IDS).logits
        right, other = llama(), llama()
        right.load_adapter(tmp_path)
        assert torch.equal(move(right)(IDS).logits, want)
        with torch.no_grad():
            other.model.layers[1].mlp.down_proj.weight.mul_(1.01)
        other.load_adapter(tmp_path)
        move(other)
        with pytest.raises(ValueError, match="1.mlp.down_proj: the adapter was trained on another"):
            other(IDS)


@EVERY_CONFIG
def test_an_index_that_does_not_fit_is_refused_on_loading(config):
    model = get_peft_model(llama(), config())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    name = next(name for name in state if name.endswith("_index.default"))
    repeated = state[name].clone()
    repeated[1] = repeated[0]
    changes = [(name, state[name] + 99_999, "must lie in"), (name, repeated, "repeat")]
    if config is SpIELConfig:
        changes.append((name, state[name].flip(0), "must ascend"))
    else:
        dim = name.replace("index", "dim")
        changes.append((dim, state[dim] * 0, "s2ft_dim of adapter 'default' must be 1"))
    for name, value, message in changes:
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(state | {name: value})
    model.load_state_dict(state)
    assert torch.isfinite(model(IDS).logits).all()
