"""SpIEL's host: both modes train the same, and the base is never lost."""

import contextlib
import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_model, token_ids
from torch import nn

from s2kernels import backend, kernels, reference
from s2kernels.peft import SpIELConfig, SpIELLinear, SpIELTuner, make_optimizer
from s2kernels.peft.spiel.model import random_entries

MODES = ("inplace", "additive")
EVERY_MODE = pytest.mark.parametrize("mode", MODES)
IDS = token_ids(batch=3)


def config(**fields):
    return SpIELConfig(**dict(num_tunable_weights=1500, seed=3) | fields)


def wrapped(model=None, **fields):
    model = tiny_model("llama") if model is None else model
    return get_peft_model(model, config(**fields))


def layers(model):
    return [module for module in model.modules() if isinstance(module, SpIELLinear)]


def deltas(model, name="default"):
    return [layer.spiel_delta[name] for layer in layers(model)]


def base_state(model):
    """Copies of the base model's weights, under the names they have without an adapter."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.clone()
        for name, value in model.state_dict().items()
        if "spiel_" not in name
    }


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def randomized(model, name="default", scale=0.3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in deltas(model, name):
            noise = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
            delta.copy_(noise.to(delta.dtype) * scale)
    return model


def train(model, steps=12, total=40, **options):
    optimizer = make_optimizer(model, **dict(lr=1e-2) | options)
    tuner = SpIELTuner(model, optimizer, total)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tuner.close()
    return losses


@pytest.mark.parametrize("selection", ("accumulated_gradient", "momentum_approximation"))
@pytest.mark.parametrize("checkpointing", (False, True))
def test_every_mode_follows_the_same_trajectory(selection, checkpointing):
    """Through several reselections."""
    results = []
    for mode in MODES:
        fields = dict(selection=selection, reselection_steps=5, accumulation_steps=2)
        model = wrapped(mode=mode, **fields).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses = train(model, steps=14, lr=1e-2 if selection[0] == "a" else 3e-2)
        results.append((losses, layers(model)))
        assert losses[-1] < 0.7 * losses[0]
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-9)
    for got, want in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(got.spiel_index["default"], want.spiel_index["default"])
        difference = (got.spiel_delta["default"] - want.spiel_delta["default"]).abs().max()
        assert difference < 1e-8


@EVERY_MODE
@pytest.mark.parametrize("ops", (None, kernels), ids=("backend", "triton"))
def test_gradients_are_those_of_dense_autograd_at_the_entries(mode, ops, monkeypatch):
    dtype = torch.float64 if ops is None else torch.float32
    model = randomized(wrapped(tiny_model("llama", dtype), mode=mode))
    if ops is not None:
        monkeypatch.setattr(backend, "select", lambda x, impl=None: ops)
    model(input_ids=IDS, labels=IDS).loss.backward()
    monkeypatch.setattr(backend, "select", lambda x, impl=None: reference)

    dense = tiny_model("llama", dtype).requires_grad_(True)
    for layer in layers(model):
        weight = dense.get_submodule(layer.name).weight
        with torch.no_grad():
            where = layer.spiel_index["default"].long()
            weight.view(-1)[where] += layer.spiel_delta["default"]
    dense(input_ids=IDS, labels=IDS).loss.backward()
    assert len(layers(model)) == 14
    for layer in layers(model):
        grad = dense.get_submodule(layer.name).weight.grad.flatten()
        want = grad[layer.spiel_index["default"].long()]
        assert want.abs().max() > 1e-8
        tolerance = dict(rtol=1e-10, atol=1e-12) if ops is None else dict(rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.spiel_delta["default"].grad, want, **tolerance)


def test_the_budget_is_split_in_proportion_and_drawn_at_random():
    model = tiny_model("llama")
    total = sum(p.numel() for p in model.parameters())
    sizes = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    model = get_peft_model(model, SpIELConfig(density=0.02, seed=4))
    num = int(0.02 * total)
    assert model.peft_config["default"].num_tunable_weights == num
    for layer in layers(model):
        want = num * sizes[layer.name] // sum(sizes.values())
        index = layer.spiel_index["default"]
        assert torch.equal(index, random_entries(4, layer.name, layer.shape, want))
        assert index.dtype == torch.int32 and len(index) == len(index.unique()) == want
        assert torch.equal(index, index.sort().values)
        assert layer.spiel_delta["default"].shape == (want,)
    assert {layer.name for layer in layers(model)} == set(sizes)
    assert model.get_nb_trainable_parameters()[0] == sum(len(delta) for delta in deltas(model))


def test_density_is_of_the_base_model_for_a_second_adapter_too():
    fields = dict(num_tunable_weights=None, density=0.01, modules_to_save=["lm_head"])
    model = wrapped(**fields)
    model.add_adapter("second", config(**fields))
    first, second = (model.peft_config[name] for name in ("default", "second"))
    assert second.num_tunable_weights == first.num_tunable_weights


@pytest.mark.parametrize("num", (1, 5, 30, 34, 35))
def test_random_entries_are_uniform(num):
    counts = torch.zeros(35)
    for seed in range(300):
        index = random_entries(seed, "name", (5, 7), num)
        assert len(index.unique()) == num
        counts[index.long()] += 1
    expected = 300 * num / 35
    spread = (expected * (1 - num / 35)) ** 0.5
    assert (counts - expected).abs().max() <= 4 * spread


@EVERY_MODE
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_base_comes_back_bit_for_bit(dtype, mode):
    model = tiny_model("llama", dtype)
    original, logits = base_state(model), model(IDS).logits
    model = wrapped(model, mode=mode, reselection_steps=3, accumulation_steps=1).train()
    assert {delta.dtype for delta in deltas(model)} == {torch.float32}
    train(model, steps=5)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, logits)
        assert_same(base_state(model), original)
    trained = model(IDS).logits
    assert not torch.equal(trained, logits)
    assert_same(base_state(model), original)
    assert torch.equal(model(IDS).logits, trained)

    model.merge_adapter()
    assert torch.equal(model(IDS).logits, trained)
    changed = base_state(model)
    for layer in layers(model):
        weight, before = changed[f"{layer.name}.weight"], original[f"{layer.name}.weight"]
        others = torch.ones(weight.numel(), dtype=torch.bool)
        others[layer.spiel_index["default"].long()] = False
        assert torch.equal(weight.flatten()[others], before.flatten()[others])
        assert not torch.equal(weight, before)
    model.unmerge_adapter()
    assert_same(base_state(model), original)
    assert torch.equal(model(IDS).logits, trained)

    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged(IDS).logits, trained) and not layers(merged)
    base = model.unload()
    assert_same(base_state(base), original)
    assert not base._forward_pre_hooks and not base._forward_hooks
    assert not hasattr(base, "_ddp_params_and_buffers_to_ignore")


def test_an_exception_in_a_forward_restores_the_base():
    model = tiny_model("llama", torch.float32)
    original = [p.detach().clone() for p in model.parameters()]
    model = randomized(wrapped(model, mode="inplace"))
    want = model(IDS).logits

    def fail(module, args):
        raise KeyError("in the middle")

    hook = model.base_model.model.model.layers[1].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="in the middle"):
        model(IDS)
    hook.remove()
    raw = [p for name, p in model.named_parameters() if "spiel_" not in name]
    assert all(torch.equal(got, value) for got, value in zip(raw, original, strict=True))
    assert torch.equal(model(IDS).logits, want)


@EVERY_MODE
def test_a_disabled_pass_between_forward_and_backward_changes_no_gradient(mode):
    model = randomized(wrapped(mode=mode))
    model(input_ids=IDS, labels=IDS).loss.backward()
    want = [delta.grad.clone() for delta in deltas(model)]
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    with model.disable_adapter(), torch.no_grad():
        model(IDS)
    loss.backward()
    for delta, grad in zip(deltas(model), want, strict=True):
        torch.testing.assert_close(delta.grad, grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("first", ("base", "additive", "inplace"))
def test_another_adapter_between_forward_and_backward_changes_no_gradient(first):
    """Its entries are in the weights by then; every backward reads what its forward has read."""
    model = randomized(wrapped(mode="inplace" if first == "base" else first))
    model.add_adapter("second", config(mode="inplace", num_tunable_weights=700, seed=9))
    randomized(model, "second", seed=6)

    def forward():
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        with model.disable_adapter() if first == "base" else contextlib.nullcontext():
            return x, model(inputs_embeds=x).logits.square().sum()

    x, loss = forward()
    loss.backward()
    later_x, loss = forward()
    model.set_adapter("second")
    model(IDS)
    loss.backward()
    torch.testing.assert_close(later_x.grad, x.grad, rtol=0, atol=1e-14 * float(x.grad.abs().max()))


@pytest.mark.parametrize(
    ("how", "mode"),
    [("unload", "inplace"), ("merge_adapter", "inplace"), ("merge_adapter", "additive")],
)
def test_a_backward_after_merge_or_unload_changes_nothing(how, mode):
    model = randomized(wrapped(mode=mode))
    loss = model(input_ids=IDS, labels=IDS).loss
    getattr(model, how)()
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()


@EVERY_MODE
def test_an_adapter_travels(mode, tmp_path):
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    base = tiny_model("llama", torch.float32)
    base.save_pretrained(base_dir)
    base = type(base).from_pretrained(base_dir)
    fields = dict(mode=mode, reselection_steps=3, accumulation_steps=1, task_type="CAUSAL_LM")
    model = wrapped(base, **fields).train()
    train(model, steps=5)
    model.eval()
    want = model(IDS).logits
    model.save_pretrained(adapter_dir)

    saved = load_file(adapter_dir / "adapter_model.safetensors")
    assert len(saved) == 3 * 14
    for layer in layers(model):
        prefix = f"base_model.model.{layer.name}.spiel_"
        assert torch.equal(saved[prefix + "index"], layer.spiel_index["default"])
        assert torch.equal(saved[prefix + "delta"], layer.spiel_delta["default"])
        assert saved[prefix + "fingerprint"].shape == (1,)

    for other in MODES:
        loaded_config = PeftConfig.from_pretrained(adapter_dir)
        assert loaded_config.peft_type == "SPIEL"
        loaded_config.mode = other
        fresh = type(base).from_pretrained(base_dir)
        loaded = PeftModel.from_pretrained(fresh, adapter_dir, config=loaded_config)
        assert torch.equal(loaded(IDS).logits, want)
    auto = AutoPeftModelForCausalLM.from_pretrained(adapter_dir)
    assert torch.equal(auto(IDS).logits, want)
    cheap = PeftModel.from_pretrained(
        type(base).from_pretrained(base_dir), adapter_dir, low_cpu_mem_usage=True
    )
    assert torch.equal(cheap(IDS).logits, want)
    plain = type(base).from_pretrained(base_dir)
    plain.load_adapter(adapter_dir)
    assert torch.equal(plain(IDS).logits, want)


@EVERY_MODE
def test_an_adapter_is_refused_on_another_base(mode, tmp_path):
    """Also after a reselection; and it is not where the base differs in dtype alone."""
    fields = dict(mode=mode, reselection_steps=3, accumulation_steps=1, task_type="CAUSAL_LM")
    model = wrapped(tiny_model("llama", torch.float32), **fields).train()
    train(model, steps=5)
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    other = tiny_model("llama", torch.float32)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    message = "model.layers.1.mlp.down_proj: the adapter was trained on another base"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    other.load_adapter(tmp_path)
    with pytest.raises(ValueError, match=message):
        other(IDS)
    loaded = PeftModel.from_pretrained(tiny_model("llama", torch.float64), tmp_path)
    assert (loaded(IDS).logits - want).abs().max() < 1e-3


def test_positions_that_do_not_fit_are_refused_on_loading():
    model = wrapped()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    name = next(name for name in state if "spiel_index" in name)
    repeated = state[name].clone()
    repeated[1] = repeated[0]
    for change, error, message in (
        (repeated, ValueError, "must ascend without repeating a position"),
        (state[name].flip(0), ValueError, "must ascend"),
        (state[name] + 5000, ValueError, "must lie in"),
    ):
        with pytest.raises(error, match=f"q_proj: spiel_index of adapter 'default' {message}"):
            model.load_state_dict(state | {name: change})
    model.load_state_dict(state)
    assert torch.isfinite(model(IDS).logits).all()


def test_other_positions_while_the_entries_are_written():
    """Assigned by whoever loads without load_state_dict: W0 goes back to where it came from."""
    model = tiny_model("llama")
    original = base_state(model)
    model = randomized(wrapped(model, mode="inplace"))
    model(IDS)
    for layer in layers(model):
        index = layer.spiel_index["default"]
        layer.spiel_index["default"] = random_entries(9, layer.name, layer.shape, len(index))
        layer.spiel_fingerprint["default"] = torch.zeros(1, dtype=torch.int64)
    want = model(IDS).logits
    assert_same(base_state(model), original)
    assert torch.equal(model(IDS).logits, want)


@EVERY_MODE
@pytest.mark.parametrize("then", ("forward", "submodule", "state_dict", "load", "merged", "dtype"))
def test_another_weight_in_the_place_of_one_with_entries(mode, then):
    """Neither is changed: what was there gets its W0 back, and the new one is W0 from then on."""
    model = randomized(wrapped(mode=mode))
    layer = layers(model)[0]
    old, index = layer.base_layer.weight, layer.spiel_index["default"].long()
    original = old.detach().clone()
    model(IDS)
    if then == "merged":
        model.merge_adapter()
    fresh = torch.randn(
        layer.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8)
    )
    layer.base_layer.weight = nn.Parameter(fresh.clone(), requires_grad=False)
    wanted = fresh.clone()
    wanted.view(-1)[index] += layer.spiel_delta["default"].detach()
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    if then == "forward":
        model(IDS)
    elif then == "load":
        model.load_state_dict(model.state_dict())
    elif then == "merged":
        model.unmerge_adapter()
    elif then == "dtype":
        model.float()
        model.double()
        fresh, wanted = fresh.float().double(), wanted.float().double()
    if then != "state_dict":
        want = nn.functional.linear(x, wanted, layer.base_layer.bias)
        error = (layer(x) - want).detach().abs().max()
        assert error < (1e-5 if then == "dtype" else 1e-12)
    state = model.state_dict()
    name = f"base_model.model.{layer.name}."
    assert torch.equal(state[f"{name}base_layer.weight"], fresh)
    assert torch.equal(old, original)
    # the fingerprint is that of the new base
    again = tiny_model("llama")
    with torch.no_grad():
        again.get_submodule(layer.name).weight.copy_(fresh)
    loaded = wrapped(again, mode=mode)
    loaded.load_state_dict(state)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@EVERY_MODE
@pytest.mark.parametrize("what", ("weight", "delta", "index", "adapter"))
def test_a_backward_reads_what_its_forward_read_or_is_refused(mode, what):
    """Other tensors are in the place of those by then, and have been written into the weight."""
    model = randomized(wrapped(mode=mode))
    model.add_adapter("second", config(mode=mode, num_tunable_weights=700, seed=9))
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def forward():
        return model(inputs_embeds=x).logits.square().sum()

    (want,) = torch.autograd.grad(forward(), x)
    loss = forward()
    layer = layers(model)[0]
    if what == "weight":
        fresh = torch.randn_like(layer.base_layer.weight)
        layer.base_layer.weight = nn.Parameter(fresh, requires_grad=False)
    elif what == "delta":
        layer.spiel_delta["default"] = nn.Parameter(layer.spiel_delta["default"].detach() + 1)
    elif what == "index":
        num = len(layer.spiel_index["default"])
        layer.spiel_index["default"] = random_entries(7, layer.name, layer.shape, num)
    else:
        model.delete_adapter("default")
    model(IDS)
    if mode == "inplace":
        with pytest.raises(RuntimeError, match="is another one than it was in the forward"):
            loss.backward()
    else:
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want, rtol=0, atol=1e-13)


def test_a_weight_that_comes_to_be_shared_is_left_alone():
    model = randomized(wrapped(mode="auto"))
    model(IDS)
    blocks = model.base_model.model.model.layers
    first, second = (block.mlp.down_proj for block in blocks)
    assert second.written == "default"
    second.base_layer.weight = first.base_layer.weight
    want = first.base_layer.weight.detach().clone()
    _, entries, index = first.displaced
    want.view(-1)[index.long()] = entries
    model(IDS)
    assert first.written is None and second.written is None
    assert torch.equal(first.base_layer.weight, want)


@EVERY_MODE
def test_several_adapters(mode, tmp_path):
    model = tiny_model("llama")
    original, logits = base_state(model), model(IDS).logits
    model = randomized(wrapped(model, mode=mode))
    first = model(IDS).logits
    model.add_adapter("second", config(mode=mode, num_tunable_weights=700, seed=9))
    randomized(model, "second", seed=6)
    assert torch.equal(model(IDS).logits, first)
    model.set_adapter("second")
    second = model(IDS).logits
    assert (second - first).abs().max() > 1e-3
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)

    model.merge_adapter(adapter_names=["default", "second"])
    both = model(IDS).logits
    model.unmerge_adapter()
    assert_same(base_state(model), original)
    dense = tiny_model("llama")
    for layer in layers(model):
        weight = dense.get_submodule(layer.name).weight.data.view(-1)
        for name in ("default", "second"):
            weight[layer.spiel_index[name].long()] += layer.spiel_delta[name].detach()
    assert (dense(IDS).logits - both).abs().max() < 1e-12

    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one SpIEL adapter can be active at a time"):
        model(IDS)
    with pytest.raises(ValueError, match="does not go with SpIEL"):
        model(input_ids=IDS, adapter_names=["default", "second", "default"])
    model.set_adapter("second")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path / "second", adapter_name="second"
    )
    assert torch.equal(loaded(IDS).logits, second)
    model.delete_adapter("default")
    assert torch.equal(model(IDS).logits, second)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, logits)
    assert_same(base_state(model.unload()), original)


@EVERY_MODE
def test_a_deep_copy_trains_apart(mode):
    model = wrapped(mode=mode, reselection_steps=3, accumulation_steps=1).train()
    train(model, steps=2)
    before = model(IDS).logits.detach()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, before)
    losses = train(twin, steps=5)
    assert losses[-1] < losses[0]
    assert torch.equal(model(IDS).logits, before)
    assert_same(base_state(twin), base_state(model))


@EVERY_MODE
def test_safe_merge_looks_at_what_the_weight_would_hold(mode):
    """A sum that fp32 holds may be infinite in the weight's dtype."""
    model = nn.Sequential(nn.Linear(24, 16, dtype=torch.float16))
    original = model[0].weight.clone()
    model = wrapped(model, target_modules=["0"], num_tunable_weights=50, mode=mode)
    randomized(model, scale=1e5)
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layers(model)[0].weight, original)


def test_nothing_is_loaded_over_merged_weights():
    model = tiny_model("llama", torch.float32)
    original = base_state(model)
    model = randomized(wrapped(model))
    model.merge_adapter()
    merged = base_state(model)
    with pytest.raises(RuntimeError, match="unmerge_adapter first"):
        model.load_state_dict(model.state_dict())
    assert_same(base_state(model), merged)
    model.unmerge_adapter()
    assert_same(base_state(model), original)


def test_a_change_of_dtype_keeps_the_entries_in_place():
    model = tiny_model("llama", torch.float32)
    original = {name: value.double() for name, value in base_state(model).items()}
    model = randomized(wrapped(model))
    want = model(IDS).logits
    model.double()
    assert (model(IDS).logits - want).abs().max() < 1e-4
    assert_same(base_state(model), original)


def test_deltas_have_the_dtype_wanted():
    model = wrapped(
        tiny_model("llama", torch.bfloat16),
        delta_dtype="bfloat16",
        reselection_steps=3,
        accumulation_steps=1,
    ).train()
    assert {delta.dtype for delta in deltas(model)} == {torch.bfloat16}
    losses = train(model, steps=8)
    assert losses[-1] < losses[0] - 0.1


def test_a_shared_weight_is_trained_in_a_copy():
    model = tiny_model("llama")
    blocks = model.model.layers
    blocks[1].mlp.down_proj.weight = blocks[0].mlp.down_proj.weight
    original = base_state(model)
    model = randomized(wrapped(model))
    model(IDS)
    inplace = [layer.name for layer in layers(model) if layer.written]
    assert len(inplace) == 12 and not any("down_proj" in name for name in inplace)
    assert_same(base_state(model), original)
    with pytest.raises(ValueError, match="the weight is shared by 2 modules"):
        get_peft_model(model.unload(), config(mode="inplace"))


def test_data_parallel_is_refused():
    replica = wrapped().base_model.model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        replica(IDS)


def _refusals():
    return {
        "more than there are": (dict(num_tunable_weights=10**6), ValueError, "must not exceed"),
        "no linear layer": (dict(target_modules=["mlp"]), TypeError, "0.mlp is a LlamaMLP"),
        "no target": (dict(target_modules=["c_attn"]), ValueError, "not found in the base model"),
    }


@pytest.mark.parametrize("case", _refusals())
def test_a_failed_conversion_leaves_the_model_as_it_was(case):
    fields, error, message = _refusals()[case]
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    modules = {name: id(module) for name, module in model.named_modules()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    original = base_state(model)
    with pytest.raises(error, match=message):
        wrapped(model, **fields)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert_same(base_state(model), original)


def test_a_failed_second_adapter_leaves_the_first_one_working():
    model = randomized(wrapped())
    want = model(IDS).logits
    with pytest.raises(ValueError, match="must not exceed"):
        model.add_adapter("second", config(num_tunable_weights=10**6))
    assert set(model.peft_config) == {"default"}
    assert torch.equal(model(IDS).logits, want)
    assert train(model.train(), steps=3)


def test_layers_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="h.0.attn.c_attn is a Conv1D"):
        get_peft_model(tiny_model("gpt2"), config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(mode="fast"), "mode must be one of"),
        (dict(selection="random"), "selection must be one of 'accumulated_gradient'"),
        (dict(replacement_schedule="steps"), "replacement_schedule must be one of"),
        (dict(delta_dtype="int8"), "delta_dtype must be one of"),
        (dict(density=0.0), r"density must be a float in \(0, 1\], got 0.0"),
        (dict(density=1), r"density must be a float in \(0, 1\], got 1"),
        (dict(num_tunable_weights=0), "num_tunable_weights must be an int of at least 1, got 0"),
        (dict(accumulation_steps=20), "less than reselection_steps, got 20 and 20"),
        (dict(initial_replacement_rate=2.0), r"initial_rate must lie in \[0, 1\]"),
        (dict(target_modules=".*o_proj", layers_to_transform=0), "layers_to_transform does not go"),
        (dict(target_modules=".*o_proj", layers_pattern="h"), "layers_pattern does not go with"),
        (dict(layers_pattern="layers"), "layers_pattern needs layers_to_transform"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        SpIELConfig(**fields)
