"""The PEFT host: every mode and layout trains the same, and the base is never lost."""

import copy
import json
import warnings
from contextlib import nullcontext

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from tiny_models import MODEL_TYPES, tiny_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from bench.memory import kept_by
from s2kernels import backend, kernels, reference
from s2kernels.coupling import channels_of_heads
from s2kernels.peft import S2FTConfig, S2FTLinear, report
from s2kernels.peft.layer import S2FTLayer
from s2kernels.select import random_units

MODES = ("inplace", "additive")
LAYOUTS = ("permute", "block", "gather")
COMBINATIONS = [(mode, layout) for mode in MODES for layout in LAYOUTS]
EVERY_COMBINATION = pytest.mark.parametrize(("mode", "layout"), COMBINATIONS)
# three blocks of 64 channels, of a mixture in each expert
WIDE = dict(intermediate_size=192, moe_intermediate_size=192)
# "all-linear" would name layers of the head, too, in encoders, and no tensors of experts.
EVERY_PROJECTION = dict.fromkeys(("bert", "roberta"), r".*\.layer\..*(query|key|value|dense)")
EVERY_PROJECTION |= dict.fromkeys(("mixtral", "qwen3_moe"), r".*_proj")
NUM_PROJECTIONS = dict(
    phi3=8, gpt2=8, gpt_neox=8, opt=12, bert=12, roberta=12, mixtral=12, qwen3_moe=13
)


def config(**fields):
    return S2FTConfig(**dict(heads=2, channels=64, seed=3) | fields)


def base_state(model):
    """Copies of the base model's weights, under the names they have without an adapter."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.clone()
        for name, value in model.state_dict().items()
        if "s2ft_" not in name
    }


def raw_weights(model):
    """Copies of what the base parameters hold at this moment; no hook is asked."""
    return [p.detach().clone() for n, p in model.named_parameters() if "s2ft_" not in n]


def deltas(model):
    return {n: p for n, p in model.named_parameters() if "s2ft_delta" in n}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def train(model, steps=20, ids=None):
    """AdamW at a rate that moves the model far; returns the losses."""
    ids = token_ids(batch=3) if ids is None else ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def randomized(model, scale=0.3):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.copy_(torch.randn(delta.shape, generator=generator, dtype=delta.dtype) * scale)
    return model


def with_indices(model, indices):
    """Gives the adapter these channels, as loading one does."""
    state = {name.replace("s2ft_delta", "s2ft_index"): index for name, index in indices.items()}
    model.load_state_dict(state, strict=False)
    return model


def indices(model):
    return {
        name: model.get_buffer(name.replace("s2ft_delta", "s2ft_index")).clone()
        for name in deltas(model)
    }


@pytest.mark.parametrize("every_projection", (False, True), ids=("o+down", "all"))
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_mode_and_layout_follows_the_same_trajectory(model_type, every_projection):
    """From the channels that layout="block" draws, which every layout can train."""
    targets = EVERY_PROJECTION.get(model_type, "all-linear") if every_projection else None
    chosen = None
    reference = None
    for mode, layout in [("additive", "block"), *COMBINATIONS]:
        model = tiny_model(model_type, **WIDE)
        model = get_peft_model(
            model, config(mode=mode, layout=layout, target_modules=targets)
        ).train()
        chosen = chosen or indices(model)
        with_indices(model, chosen)
        losses = train(model, steps=20)
        result = torch.tensor(losses), [d.detach().clone() for d in deltas(model).values()]
        if reference is None:
            reference = result
            assert losses[-1] < 0.8 * losses[0]
        difference = max(
            (got - want).abs().max().item()
            for got, want in zip(
                [result[0], *result[1]], [reference[0], *reference[1]], strict=True
            )
        )
        assert difference <= 1e-10, (mode, layout)


@EVERY_COMBINATION
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_are_those_of_dense_autograd_on_the_slices(model_type, mode, layout):
    ids = token_ids()
    targets = EVERY_PROJECTION.get(model_type, "all-linear")
    fields = dict(mode=mode, layout=layout, target_modules=targets)
    model = randomized(get_peft_model(tiny_model(model_type, **WIDE), config(**fields)))
    model(input_ids=ids, labels=ids).loss.backward()

    dense = tiny_model(model_type, **WIDE).requires_grad_(True)
    slices = {}
    for name, delta in deltas(model).items():
        module = name.removeprefix("base_model.model.").removesuffix(".s2ft_delta.default")
        index = model.get_buffer(name.replace("s2ft_delta", "s2ft_index")).long()
        is_in = int(model.get_buffer(name.replace("s2ft_delta", "s2ft_dim"))) == 1
        if index.dim() == 2:  # of experts
            weight, where = dense.get_parameter(module), (torch.arange(4).unsqueeze(1), index)
        else:
            weight, where = dense.get_submodule(module).weight, (index,)
        is_conv1d = index.dim() == 1 and isinstance(dense.get_submodule(module), Conv1D)
        transposed = is_in != is_conv1d  # the trained channels are then columns
        with torch.no_grad():
            (weight.mT if transposed else weight)[where] += delta.mT if is_in else delta
        slices[name] = (weight, transposed, where, is_in)
    dense(input_ids=ids, labels=ids).loss.backward()
    assert len(slices) == NUM_PROJECTIONS.get(model_type, 14)
    for name, (weight, transposed, where, is_in) in slices.items():
        grad = (weight.grad.mT if transposed else weight.grad)[where]
        got, want = deltas(model)[name].grad, grad.mT if is_in else grad
        assert want.abs().max() > 1e-8
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=name)


def test_the_default_trains_the_drawn_heads_and_channels_of_o_and_down(capsys):
    model = tiny_model("llama", **WIDE)
    model = get_peft_model(model, config(layout="gather"))
    for block in range(2):
        layer = model.base_model.model.model.layers[block]
        heads = random_units(3, f"model.layers.{block}.self_attn", 8, 2)
        channels = random_units(3, f"model.layers.{block}.mlp", 192, 64)
        o_proj, down_proj = layer.self_attn.o_proj, layer.mlp.down_proj
        assert torch.equal(o_proj.s2ft_index["default"], channels_of_heads(heads, 4))
        assert torch.equal(down_proj.s2ft_index["default"], channels)
        assert o_proj.s2ft_delta["default"].shape == (32, 8)
        assert down_proj.s2ft_delta["default"].shape == (32, 64)
        assert not isinstance(layer.mlp.up_proj, S2FTLinear)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.get_nb_trainable_parameters()[0] == trainable == 2 * (32 * 8 + 32 * 64)
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,} ||" in capsys.readouterr().out


@EVERY_COMBINATION
def test_an_adapter_travels_in_the_original_basis(mode, layout, tmp_path):
    ids = token_ids()
    fields = dict(mode=mode, layout=layout)
    model = randomized(get_peft_model(tiny_model("llama", **WIDE), config(**fields)))
    want = model(ids).logits.detach()
    chosen = indices(model)
    model.save_pretrained(tmp_path)

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 4 * len(chosen)
    for name, index in chosen.items():
        prefix = name.removesuffix("s2ft_delta.default")
        assert torch.equal(saved[prefix + "s2ft_index"], index)
        assert torch.equal(saved[prefix + "s2ft_delta"], deltas(model)[name])
        assert saved[prefix + "s2ft_dim"] == torch.tensor(1, dtype=torch.int32)

    for other_mode, other_layout in COMBINATIONS:
        loaded_config = PeftConfig.from_pretrained(tmp_path)
        loaded_config.mode, loaded_config.layout = other_mode, other_layout
        base = tiny_model("llama", **WIDE)
        loaded = PeftModel.from_pretrained(base, tmp_path, config=loaded_config)
        difference = (loaded(ids).logits - want).abs().max()
        assert difference <= 1e-12, (other_mode, other_layout)
        merged = loaded.merge_and_unload()
        assert not any(isinstance(module, S2FTLinear) for module in merged.modules())
        assert (merged(ids).logits - want).abs().max() <= 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_type", ("phi3", "gpt2", "gpt_neox", "bert", "qwen3_moe"))
def test_the_life_of_an_adapter_on_other_layouts_of_weights(model_type, mode, tmp_path):
    """Fused, transposed, interleaved, named otherwise, beside experts: nothing is special."""
    ids = token_ids()
    base = tiny_model(model_type, **WIDE)
    original, logits = base_state(base), base(ids).logits
    targets = EVERY_PROJECTION.get(model_type, "all-linear")
    model = randomized(get_peft_model(base, config(mode=mode, target_modules=targets)))
    want = model(ids).logits.detach()
    assert (want - logits).abs().max() > 1e-3
    assert model.base_model.base_weights.permutations
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


def test_the_default_targets_of_each_type_are_trained():
    for model_type in MODEL_TYPES:
        model = get_peft_model(tiny_model(model_type, **WIDE), config())
        dims = [m.dim for m in model.modules() if isinstance(m, S2FTLayer)]
        # two blocks, each with an attention and a FFN or the experts of one
        assert dims == ["in"] * 4, model_type


@EVERY_COMBINATION
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_base_comes_back_bit_for_bit(dtype, mode, layout):
    ids = token_ids()
    model = tiny_model("llama", dtype, **WIDE)
    original, logits = base_state(model), model(ids).logits
    model = get_peft_model(model, config(mode=mode, layout=layout)).train()
    assert {delta.dtype for delta in deltas(model).values()} == {torch.float32}
    train(model, steps=3)

    with model.disable_adapter():
        assert (model(ids).logits - logits).abs().max() <= 8 * torch.finfo(dtype).eps * 4
        assert_same(base_state(model), original)
    trained = model(ids).logits
    assert not torch.equal(trained, logits)
    assert_same(base_state(model), original)
    assert torch.equal(model(ids).logits, trained)

    model.merge_adapter()
    assert not torch.equal(
        base_state(model)["model.layers.0.mlp.down_proj.weight"],
        original["model.layers.0.mlp.down_proj.weight"],
    )
    model.unmerge_adapter()
    assert_same(base_state(model), original)
    assert torch.equal(model(ids).logits, trained)

    base = model.unload()
    assert_same(base_state(base), original)
    assert torch.equal(base(ids).logits, logits)
    assert not base._forward_pre_hooks and not base._forward_hooks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exception_in_a_forward_restores_the_base(layout):
    ids = token_ids()
    model = tiny_model("llama", torch.float32, **WIDE)
    original = base_state(model)
    model = randomized(get_peft_model(model, config(mode="inplace", layout=layout)))
    want = model(ids).logits

    def fail(module, args):
        raise KeyError("in the middle")

    layer = model.base_model.model.model.layers[1]
    for target in (layer.self_attn, layer.mlp.down_proj):
        hook = target.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="in the middle"):
            model(ids)
        hook.remove()
        slices = [m.written for m in model.modules() if isinstance(m, S2FTLinear)]
        assert slices == [None] * 4
        if layout != "permute":  # the raw weights are then in the original basis, too
            assert all(
                torch.equal(got, value)
                for got, value in zip(raw_weights(model), original.values(), strict=True)
            )
        assert_same(base_state(model), original)
        assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_disabled_pass_between_forward_and_backward_changes_no_gradient(mode, layout):
    """As DPO does: policy forward, reference forward with the adapter off, backward."""
    ids = token_ids()
    fields = dict(mode=mode, layout=layout, target_modules="all-linear")
    model = randomized(get_peft_model(tiny_model("llama", **WIDE), config(**fields)))
    reference = tiny_model("llama", **WIDE)(ids).logits

    model(input_ids=ids, labels=ids).loss.backward()
    want = {name: delta.grad.clone() for name, delta in deltas(model).items()}

    def disturb_and_leave():
        with model.disable_adapter(), torch.no_grad():
            assert (model(ids).logits - reference).abs().max() <= 1e-12

    def take_the_slices_out():
        for module in model.modules():
            if isinstance(module, S2FTLinear):
                module.restore()

    for disturb in (disturb_and_leave, take_the_slices_out):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        disturb()
        loss.backward()
        for name, delta in deltas(model).items():
            torch.testing.assert_close(delta.grad, want[name], rtol=0, atol=1e-14)

    # a backward while the adapter is off; what is off stays off
    loss = model(input_ids=ids, labels=ids).loss
    grads = {}
    with model.disable_adapter():
        tensors = list(deltas(model).values())
        for tensor in tensors:
            tensor.requires_grad_(True)
        grads = torch.autograd.grad(loss, tensors)
        assert (model(ids).logits - reference).abs().max() <= 1e-12
    for grad, name in zip(grads, want, strict=True):
        torch.testing.assert_close(grad, want[name], rtol=0, atol=1e-14)


def assert_own_gradient_despite_a_later_pass(model, first):
    """A pass of W0, of the base or with two adapters added; then one that writes slices; only then
    its backward.
    """
    shape = (2, 9, model.config.hidden_size)
    embeds = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    embeds.requires_grad_()
    base_state(model)  # whatever is written in by now
    grads = []
    for later in (False, True):
        model.base_model.set_adapter(["default", "second"])
        with model.disable_adapter() if first == "base" else nullcontext():
            loss = model(inputs_embeds=embeds).logits.square().sum()
        if later:
            model.set_adapter("default")
            model(inputs_embeds=embeds)
            assert any(layer.written for layer in model.base_model.base_weights.layers)
        grads.append(torch.autograd.grad(loss, embeds)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("first", ("base", "both"))
def test_a_pass_of_the_slices_written_later_changes_no_gradient(first):
    fields = dict(layout="gather", target_modules="all-linear")
    model = get_peft_model(tiny_model("llama", **WIDE), config(**fields))
    model.add_adapter("second", config(seed=7, **fields))
    assert_own_gradient_despite_a_later_pass(randomized(model), first)


def test_a_state_dict_between_forward_and_backward_is_an_error_or_harmless():
    """Un-permuting moves the version of a weight that autograd has saved: no wrong gradient."""
    ids = token_ids()
    model = randomized(get_peft_model(tiny_model("llama", **WIDE), config(layout="permute")))
    loss = model(input_ids=ids, labels=ids).loss
    model.state_dict()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    model = randomized(get_peft_model(tiny_model("llama", **WIDE), config(layout="gather")))
    model(input_ids=ids, labels=ids).loss.backward()
    want = {name: delta.grad.clone() for name, delta in deltas(model).items()}
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    model.state_dict()
    loss.backward()
    for name, delta in deltas(model).items():
        assert torch.equal(delta.grad, want[name])


@pytest.mark.parametrize("use_reentrant", (True, False))
@EVERY_COMBINATION
def test_gradient_checkpointing_trains_the_same(mode, layout, use_reentrant):
    ids = token_ids()
    grads = []
    for checkpointing in (False, True):
        model = randomized(
            get_peft_model(tiny_model("llama", **WIDE), config(mode=mode, layout=layout))
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([delta.grad for delta in deltas(model).values()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fuse", (True, False), ids=("fused", "apart"))
@EVERY_COMBINATION
def test_saved_activations_are_those_of_the_floor_plus_the_slices(mode, layout, fuse):
    """The floor saves gate, silu(gate) and up of every FFN. Fused, a FFN saves gate and up, and the
    slice of neither.
    """
    ids = token_ids(batch=4, length=16)

    def saved(model):
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        kept = kept_by(lambda: model(input_ids=ids, labels=ids).loss, model)
        assert kept.unseen == 0
        return kept.saved

    floor = saved(tiny_model("llama", torch.float32, **WIDE).requires_grad_(False).train())
    model = tiny_model("llama", torch.float32, **WIDE)
    model = get_peft_model(model, config(mode=mode, layout=layout, fuse=fuse)).train()
    model(ids)  # the base slices exist from the first forward on
    of_ffn = 2 * 192 if fuse else 0
    trained = [index for name, index in indices(model).items() if "mlp" not in name or not fuse]
    num_trained = sum(index.numel() for index in trained)
    assert saved(model) - floor == 4 * 16 * (num_trained - of_ffn) * 4


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


def test_inplace_wants_exactly_one_active_adapter():
    model = get_peft_model(tiny_model("llama", **WIDE), config(mode="inplace"))
    model.add_adapter("second", config(seed=9))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="exactly one active adapter"):
        model(token_ids())


@EVERY_COMBINATION
def test_a_deep_copy_trains_apart(mode, layout):
    ids = token_ids()
    model = get_peft_model(tiny_model("llama", **WIDE), config(mode=mode, layout=layout)).train()
    train(model, steps=2)
    before = model(ids).logits.detach()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, before)
    losses = train(twin, steps=5)
    assert losses[-1] < losses[0]
    assert not torch.equal(twin(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert_same(base_state(twin), base_state(model))


@EVERY_COMBINATION
def test_a_change_of_dtype_keeps_the_slices_in_place(mode, layout):
    ids = token_ids()
    for dtype, error in ((torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.01)):
        model = tiny_model("llama", torch.float32, **WIDE)
        original = {name: value.to(dtype) for name, value in base_state(model).items()}
        model = randomized(get_peft_model(model, config(mode=mode, layout=layout)))
        want = model(ids).logits
        model.to(dtype)
        assert (model(ids).logits - want).abs().max() < error
        assert_same(base_state(model), original)


@EVERY_COMBINATION
def test_the_device_trains_as_fp64_on_the_cpu_does(mode, layout, device):
    """On a GPU this is the host on the compiled kernels."""
    ids = token_ids(batch=3)
    losses = []
    for dtype, where in ((torch.float64, "cpu"), (torch.float32, device)):
        model = tiny_model("llama", dtype, **WIDE).to(where)
        model = get_peft_model(model, config(mode=mode, layout=layout)).train()
        losses.append(torch.tensor(train(model, steps=8, ids=ids.to(where)), dtype=torch.float64))
        assert all(
            delta.device.type == torch.device(where).type for delta in deltas(model).values()
        )
    assert (losses[0] - losses[1]).abs().max() < 1e-4


@EVERY_COMBINATION
@pytest.mark.parametrize("model_type", ("llama", "gpt2"))  # gpt2's weights are transposed
def test_the_host_runs_on_the_triton_kernels(model_type, mode, layout, device, monkeypatch):
    """Every op of a step, dense GEMMs included, from `s2kernels.kernels`."""
    ids = token_ids().to(device)
    grads = []
    for ops in (reference, kernels):
        monkeypatch.setattr(backend, "select", lambda x, impl=None, ops=ops: ops)
        model = tiny_model(model_type, torch.float32, **WIDE).to(device)
        fields = dict(mode=mode, layout=layout, target_modules="all-linear")
        model = randomized(get_peft_model(model, config(**fields)))
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([delta.grad for delta in deltas(model).values()])
        with model.disable_adapter():
            model(ids)
        assert_same(
            base_state(model), base_state(tiny_model(model_type, torch.float32, **WIDE).to(device))
        )
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_inference_mode_first_then_training():
    model = get_peft_model(tiny_model("llama", **WIDE), config())
    with torch.inference_mode():
        model(token_ids())
    losses = train(model.train(), steps=5)
    assert losses[-1] < losses[0]


@EVERY_COMBINATION
def test_a_part_of_the_model_can_be_called_alone(mode, layout):
    """Its slices are those of now, not of the last forward of the whole."""
    ids = token_ids()
    model = get_peft_model(tiny_model("llama", **WIDE), config(mode=mode, layout=layout))
    model(ids)
    randomized(model)
    inner = model.base_model.model.model
    hidden = inner(ids).last_hidden_state
    want = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_generate_and_the_ways_to_load(mode, tmp_path):
    ids = token_ids()
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    base = tiny_model("llama", torch.float32, **WIDE)
    base.save_pretrained(base_dir)
    base = type(base).from_pretrained(base_dir)
    model = randomized(get_peft_model(base, config(mode=mode, task_type="CAUSAL_LM")))
    want = model(ids).logits
    tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    model.save_pretrained(adapter_dir)
    assert json.loads((adapter_dir / "adapter_config.json").read_text())["peft_type"] == "S2FT"

    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter_dir)
    assert torch.equal(loaded(ids).logits, want)
    assert torch.equal(loaded.generate(input_ids=ids, max_new_tokens=6, do_sample=False), tokens)
    cheap = PeftModel.from_pretrained(
        type(base).from_pretrained(base_dir), adapter_dir, low_cpu_mem_usage=True
    )
    assert torch.equal(cheap(ids).logits, want)
    plain = type(base).from_pretrained(base_dir)
    plain.load_adapter(adapter_dir)
    assert torch.equal(plain(ids).logits, want)
    resumed = PeftModel.from_pretrained(
        type(base).from_pretrained(base_dir), adapter_dir, is_trainable=True
    )
    assert train(resumed.train(), steps=4)[-1] < train(resumed, steps=1)[0] + 1


def test_the_report_counts_what_is_trained():
    model = get_peft_model(
        tiny_model("llama", **WIDE), config(target_modules=["o_proj", "up_proj"])
    )
    lines = [line.split() for line in report(model).splitlines()]
    assert len(lines) == 1 + 4 + 1
    name = "model.layers.1.mlp.up_proj"
    (row,) = (line for line in lines if line[0] == name)
    assert row == [name, "out", "64", "192", "2,048", "64", f"{2048 / (32 + 192):.1f}"]
    assert lines[-1] == ["total", f"{model.get_nb_trainable_parameters()[0]:,}"]
    with pytest.raises(ValueError, match="no S2FT adapter named 'other'"):
        report(model, "other")


def test_the_model_card_has_a_snippet_that_works(tmp_path):
    ids = token_ids()
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    tiny_model("llama", torch.float32, **WIDE).save_pretrained(base_dir)
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    model = randomized(get_peft_model(base, config(task_type="CAUSAL_LM")))
    for _ in range(2):
        model.save_pretrained(adapter_dir)
    card = (adapter_dir / "README.md").read_text()
    assert card.count("## S2FT adapter") == 1
    assert "- s2ft\n" in card and "arxiv:2412.06289" in card and "## Model Details" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(snippet.replace("PATH OF THIS FOLDER", str(adapter_dir)), scope)
    assert torch.equal(scope["model"](ids).logits, model(ids).logits)


def test_injection_without_a_peft_model():
    ids = token_ids()
    model = tiny_model("llama", **WIDE)
    original, logits = base_state(model), model(ids).logits
    model = inject_adapter_in_model(config(), model)
    assert (model(ids).logits - logits).abs().max() < 1e-12
    randomized(model)
    assert (model(ids).logits - logits).abs().max() > 1e-3
    assert_same(base_state(model), original)


@pytest.mark.parametrize("selection", ("random", "weight"))
@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (dict(layers_to_transform=[1]), ["1.self_attn.o_proj", "1.mlp.down_proj"]),
        (dict(exclude_modules=["o_proj"]), ["0.mlp.down_proj", "1.mlp.down_proj"]),
        (dict(target_modules=r".*\.1\.mlp\.(up|down)_proj"), ["1.mlp.up_proj", "1.mlp.down_proj"]),
    ],
)
def test_peft_fields_choose_the_targets(fields, wanted, selection):
    model = get_peft_model(tiny_model("llama", **WIDE), config(selection=selection, **fields))
    names = [name.removeprefix("base_model.model.model.layers.") for name in deltas(model)]
    assert [name.removesuffix(".s2ft_delta.default") for name in names] == wanted


def test_modules_to_save_are_trained_and_saved(tmp_path):
    ids = token_ids()
    model = get_peft_model(tiny_model("llama", **WIDE), config(modules_to_save=["lm_head"])).train()
    train(model, steps=2)
    want = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", **WIDE), tmp_path)
    assert (loaded(ids).logits - want).abs().max() < 1e-12


def test_compile():
    ids = token_ids()
    for mode, layout, fullgraph in (("additive", "gather", True), ("inplace", "permute", False)):
        torch._dynamo.reset()
        fields = dict(mode=mode, layout=layout)
        model = randomized(get_peft_model(tiny_model("llama", **WIDE), config(**fields)))
        model(input_ids=ids, labels=ids).loss.backward()
        want = [delta.grad.clone() for delta in deltas(model).values()]
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
            compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for delta, grad in zip(deltas(model).values(), want, strict=True):
            torch.testing.assert_close(delta.grad, grad, rtol=0, atol=1e-12)


def test_auto_is_additive_where_a_weight_is_shared():
    model = tiny_model("llama", torch.float32, **WIDE)
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    original = base_state(model)
    model = randomized(get_peft_model(model, config()))
    model(token_ids())
    assert not any("mlp" in name for name in model.base_model.base_weights.permutations)
    with pytest.raises(ValueError, match="the weight is shared by 2 modules"):
        get_peft_model(model.unload(), config(mode="inplace", layout="gather"))
    assert_same(base_state(model.base_model.model), original)


def test_data_parallel_is_refused():
    model = get_peft_model(tiny_model("llama", **WIDE), config())
    inner = model.base_model.model
    replica = inner._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(token_ids())


def _refusals():
    return {
        "more heads than there are": (dict(heads=9), ValueError, "heads: 9 wanted of 8"),
        "no channels": (dict(channels=0), ValueError, "channels: 0 wanted"),
        "a share above 1": (dict(channels=1.5), ValueError, "channels: 1.5 wanted"),
        "a share of nothing": (dict(heads=0.0), ValueError, "heads: 0.0 wanted"),
        "a bool": (dict(heads=True), TypeError, "heads: a count"),
        "a target that is not linear": (
            dict(target_modules=["o_proj", "mlp"]),
            TypeError,
            "must name linear layers",
        ),
        "a target outside the table": (
            dict(target_modules=["o_proj", "lm_head"]),
            ValueError,
            "lm_head is not in the coupling table",
        ),
        "no target": (dict(target_modules=["c_attn"]), ValueError, "not found in the base model"),
        "heads in three KV groups": (
            dict(heads=3, seed=1, layout="permute"),
            ValueError,
            "more than two partly selected KV groups",
        ),
        "blocks that do not fit": (dict(channels=200, layout="block"), ValueError, "channels"),
    }


@pytest.mark.parametrize("case", _refusals())
def test_a_failed_conversion_leaves_the_model_as_it_was(case):
    fields, error, message = _refusals()[case]
    model = tiny_model("llama", **WIDE)
    model.lm_head.requires_grad_(False)
    modules = {name: id(module) for name, module in model.named_modules()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    original, logits = base_state(model), model(token_ids()).logits
    with pytest.raises(error, match=message):
        get_peft_model(model, config(**fields))
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert_same(base_state(model), original)
    assert torch.equal(model(token_ids()).logits, logits)
    assert not model._forward_pre_hooks and not model._state_dict_pre_hooks


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(mode="fast"), "mode must be one of"),
        (dict(layout="dense"), "layout must be one of"),
        (dict(target_modules=".*o_proj", layers_to_transform=[0]), "layers_to_transform does not"),
        (dict(layers_pattern="layers"), "layers_pattern needs"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        S2FTConfig(**fields)


class Unknown(nn.Module):
    """A model of a type that the coupling table lacks."""

    def __init__(self, down):
        super().__init__()
        self.config = type("Config", (), {"model_type": "unheard_of"})()
        self.up = nn.Linear(12, 24)
        self.down = down

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("down", (nn.Linear(24, 12), Conv1D(12, 24)), ids=("Linear", "Conv1D"))
def test_an_unknown_model_type_is_refused_except_for_gather(down):
    model = Unknown(down)
    for layout in ("auto", "permute", "block"):
        with pytest.raises(ValueError, match="'unheard_of' is not in the coupling table"):
            get_peft_model(model, config(target_modules=["down"], layout=layout))
    assert model.down is down
    x = torch.randn(5, 12)
    want = model(x)
    model = get_peft_model(model, config(target_modules=["down"], layout="gather", channels=5))
    assert torch.equal(model(x), want)
    model(x).square().sum().backward()
    (delta,) = deltas(model).values()
    assert delta.shape == (12, 5) and delta.grad.abs().sum() > 0


@EVERY_COMBINATION
def test_an_adapter_is_refused_on_another_base(mode, layout, tmp_path):
    """Whichever way it is loaded; and it is not where the base differs in dtype alone."""
    ids = token_ids()
    fields = dict(mode=mode, layout=layout, task_type="CAUSAL_LM")
    model = randomized(get_peft_model(tiny_model("llama", torch.float32, **WIDE), config(**fields)))
    model(ids)
    model.save_pretrained(tmp_path)

    other = tiny_model("llama", torch.float32, **WIDE)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    message = "model.layers.1.mlp.down_proj: the adapter was trained on another base"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    other.load_adapter(tmp_path)
    with pytest.raises(ValueError, match=message):
        other(ids)

    for dtype in (torch.float64, torch.bfloat16):
        loaded = PeftModel.from_pretrained(tiny_model("llama", dtype, **WIDE), tmp_path)
        assert (loaded(ids).logits - model(ids).logits).abs().max() < 0.5
    loaded.unload().float()


def test_an_adapter_that_does_not_fit_is_refused_on_loading(tmp_path):
    model = get_peft_model(tiny_model("llama", **WIDE), config())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    name = next(name for name in state if "s2ft_index" in name)
    for change, message in (
        (lambda index: index + 500, "must lie in"),
        (lambda index: index * 0, "repeat"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(state | {name: change(state[name])})
    name = next(name for name in state if "s2ft_dim" in name)
    with pytest.raises(ValueError, match="s2ft_dim of adapter 'default' must be 1"):
        model.load_state_dict(state | {name: state[name] * 0})
    model.load_state_dict(state)
