"""Slices of expert tensors through the PEFT host: Mixtral and Qwen3-MoE."""

import copy
import json

import pytest
import torch
from model_states import assert_same, base_state
from numerics import assert_as_accurate
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from s2ft_models import (
    EVERY_COMBINATION,
    MODES,
    WIDE,
    assert_own_gradient_despite_a_later_pass,
    config,
    deltas,
    indices,
    randomized,
    train,
)
from safetensors.torch import load_file
from tiny_models import tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure.memory import kept_by
from s2kernels import backend, kernels, reference
from s2kernels.peft import report, select_indices
from s2kernels.peft.s2ft.experts import S2FTExperts, S2FTExpertTensor
from s2kernels.select import random_units, ranked_units, scores

IDS = token_ids()
MIXTURES = pytest.mark.parametrize("model_type", ("mixtral", "qwen3_moe"))
EXPERTS = "model.layers.1.mlp.experts"
ALL = r".*_proj"


def mixture(model_type="mixtral", **fields):
    return get_peft_model(tiny_model(model_type, **WIDE), config(**fields))


def moved(model, scale=0.3):
    """Other values for every adapter than `randomized` gives."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, delta in deltas(model).items():
            if not name.endswith("default"):
                delta.copy_(torch.randn(delta.shape, generator=generator, dtype=delta.dtype))
    return model


@MIXTURES
def test_the_default_trains_as_many_channels_of_each_expert(model_type):
    fields = dict(layout="gather", channels=5)
    model = get_peft_model(tiny_model(model_type), config(**fields))
    tensor = model.base_model.model.get_submodule(f"{EXPERTS}.down_proj")
    size = 40 if model_type == "mixtral" else 24
    want = [random_units(3, f"{EXPERTS}.{expert}", size, 5).tolist() for expert in range(4)]
    assert tensor.s2ft_index["default"].tolist() == want
    assert tensor.s2ft_delta["default"].shape == (4, 32, 5)
    assert tensor.s2ft_fingerprint["default"].shape == (4, 5)
    names = [name.removeprefix("base_model.model.").split(".s2ft")[0] for name in deltas(model)]
    assert f"{EXPERTS}.down_proj" in names and not any("gate_up" in name for name in names)
    row = next(line.split() for line in report(model).splitlines() if EXPERTS in line)
    assert row[1:6] == ["in", "5", str(size), f"{4 * 32 * 5:,}", "5"]
    for targets in (r".*experts\.down_proj", ["experts.down_proj"], [f"{EXPERTS}.down_proj"]):
        other = get_peft_model(tiny_model(model_type), config(**fields, target_modules=targets))
        found = [m for m in other.modules() if isinstance(m, S2FTExpertTensor)]
        assert found[-1].s2ft_index["default"].tolist() == want
        assert len(found) == len(deltas(other))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(target_modules=["experts"]), TypeError, "is a MixtralExperts; name its tensors"),
        (dict(channels=41), ValueError, "channels: 41 wanted of 40"),
        (dict(scope="global"), ValueError, "'global' cannot be had for .*0.mlp.experts"),
        (
            dict(indices={f"{EXPERTS}.down_proj": [[1], [2, 3], [4], [5]]}),
            ValueError,
            "of experts as many for each",
        ),
        (
            dict(indices={f"{EXPERTS}.down_proj": [1, 2]}),
            ValueError,
            r"down_proj: index must have shape \(4, 'R'\), got",
        ),
        (dict(indices={f"{EXPERTS}.down_proj": [[40]] * 4}), ValueError, "must lie in"),
        (dict(indices={f"{EXPERTS}.down_proj": [[3, 3]] * 4}), ValueError, "repeat"),
    ],
)
def test_refusals_leave_the_model_as_it_was(fields, error, message):
    model = tiny_model("mixtral")
    original, modules = base_state(model), {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(error, match=message):
        get_peft_model(model, config(**dict(channels=4) | fields))
    assert_same(base_state(model), original)
    assert {n: id(m) for n, m in model.named_modules()} == modules


def test_peft_sees_one_regular_model(capsys):
    model = mixture(target_modules=ALL)
    model.add_adapter("second", config(seed=9))
    model.set_adapter("second")
    status = model.get_model_status()
    assert (status.active_adapters, status.merged_adapters) == (["second"], [])
    model.merge_adapter(["second"])
    assert model.get_model_status().merged_adapters == ["second"]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    model.print_trainable_parameters()
    trained = sum(d.numel() for name, d in deltas(model).items() if name.endswith("second"))
    assert f"trainable params: {trained:,} ||" in capsys.readouterr().out


def test_a_state_dict_chooses_among_experts():
    """As where an adapter is injected for tensors that are at hand."""
    source = mixture(target_modules=[f"{EXPERTS}.down_proj", "o_proj"])
    state = get_peft_model_state_dict(source)
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    model = inject_adapter_in_model(config(), tiny_model("mixtral", **WIDE), state_dict=state)
    names = {name.removesuffix(".default") for name in deltas(model)}
    assert names == {name for name in state if name.endswith("s2ft_delta")}


def test_names_of_many_targets_stay_whole(tmp_path):
    """PEFT shortens long lists until they match no other module, and tensors are no modules."""
    names = [f"model.layers.{i}.self_attn.o_proj" for i in range(12)]
    names += [f"model.layers.{i}.mlp.experts.down_proj" for i in range(10)]
    small = dict(num_hidden_layers=12, hidden_size=8, intermediate_size=6)
    model = get_peft_model(tiny_model("mixtral", **small), config(channels=2, target_modules=names))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("mixtral", **small), tmp_path)
    assert len(deltas(loaded)) == len(deltas(model)) == 22


@pytest.mark.parametrize("leaves", ("all-linear", ("gate_proj", "up_proj", "down_proj")))
def test_names_of_many_dense_layers_do_not_grow_to_experts(leaves, tmp_path):
    """Shortened, they would: the tensors of experts are called down_proj, too."""
    size = dict(num_hidden_layers=8, hidden_size=8, head_dim=1, mlp_only_layers=list(range(7)))
    targets = leaves
    if leaves != "all-linear":
        targets = [f"model.layers.{i}.mlp.{leaf}" for i in range(7) for leaf in leaves]
    source = tiny_model("qwen3_moe", **size)
    model = get_peft_model(source, config(channels=2, target_modules=targets))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("qwen3_moe", **size), tmp_path)
    assert not any("experts" in name for name in deltas(model))
    assert deltas(loaded).keys() == deltas(model).keys()


def test_experts_that_hold_no_floats_or_are_spread_over_processes_are_refused():
    model = tiny_model("mixtral")
    experts = model.get_submodule(EXPERTS)
    experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="1.mlp.experts.down_proj cannot .*: .* over processes"):
        get_peft_model(model, config(channels=4))
    experts._is_expert_parallel = False
    experts.down_proj = torch.nn.Parameter(experts.down_proj.byte(), requires_grad=False)
    with pytest.raises(ValueError, match="must be floating to be trained, it is torch.uint8"):
        get_peft_model(model, config(channels=4))


def test_layers_and_exclusions_choose_among_experts():
    for fields in (
        dict(layers_to_transform=[1]),
        dict(exclude_modules=["layers.0.mlp.experts.down_proj", "layers.0.self_attn.o_proj"]),
        dict(layers_to_transform=[1], selection="weight"),
    ):
        names = [name.split(".s2ft")[0][-28:] for name in deltas(mixture(**fields))]
        assert names == ["model.layers.1.self_attn.o_proj"[-28:], f"{EXPERTS}.down_proj"[-28:]]


@EVERY_COMBINATION
@MIXTURES
def test_the_life_of_an_adapter(model_type, mode, layout, tmp_path):
    base = tiny_model(model_type, **WIDE)
    original, logits = base_state(base), base(IDS).logits
    model = get_peft_model(base, config(mode=mode, layout=layout, target_modules=ALL))
    assert (model(IDS).logits - logits).abs().max() <= 1e-10  # co-permuted, and nothing else
    permuted = model.base_model.keeper.arrangement.permutations
    assert (EXPERTS in permuted) == (layout == "permute")
    want = randomized(model)(IDS).logits.detach()
    assert (want - logits).abs().max() > 1e-3
    with torch.no_grad():  # the module's own forward, where slices are in the weight
        assert (model(IDS).logits - want).abs().max() <= 1e-12
    with model.disable_adapter():
        assert (model(IDS).logits - logits).abs().max() <= 1e-12
    assert_same(base_state(model), original)
    model.merge_adapter()
    assert (model(IDS).logits - want).abs().max() <= 1e-12
    model.unmerge_adapter()
    assert_same(base_state(model), original)
    twin = copy.deepcopy(model)
    assert train(twin.train(), steps=3)[-1] < 10
    assert torch.equal(model(IDS).logits, want)

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, index in indices(model).items():
        key = name.replace("s2ft_delta.default", "s2ft_index")
        assert torch.equal(saved[key], index)
    loaded = PeftModel.from_pretrained(tiny_model(model_type, **WIDE), tmp_path)
    assert (loaded(IDS).logits - want).abs().max() <= 1e-12
    merged = loaded.merge_and_unload()
    assert (merged(IDS).logits - want).abs().max() <= 1e-12
    assert not any(isinstance(m, (S2FTExperts, S2FTExpertTensor)) for m in merged.modules())
    assert base_state(merged).keys() == original.keys()
    assert_same(base_state(model.unload()), original)
    assert torch.equal(model.base_model.model(IDS).logits, logits)


def test_the_ways_to_load(tmp_path):
    base = tiny_model("mixtral", torch.float32, **WIDE)
    model = randomized(get_peft_model(base, config(task_type="CAUSAL_LM", target_modules=ALL)))
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    cheap = PeftModel.from_pretrained(
        tiny_model("mixtral", torch.float32, **WIDE), tmp_path, low_cpu_mem_usage=True
    )
    # without gradients the module's own forward runs, which adds in another order
    torch.testing.assert_close(cheap(IDS).logits, want, rtol=1e-5, atol=1e-5)
    plain = tiny_model("mixtral", torch.float32, **WIDE)
    plain.load_adapter(tmp_path)
    torch.testing.assert_close(plain(IDS).logits, want, rtol=1e-5, atol=1e-5)
    other = tiny_model("mixtral", torch.float32, **WIDE)
    with torch.no_grad():
        other.get_submodule(EXPERTS).down_proj[2] *= 1.01
    message = f"{EXPERTS}.down_proj: the adapter was trained on another base: 64 of 256"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("mode", ("auto", "additive"))
def test_several_adapters_and_their_sums(mode, tmp_path):
    model = randomized(mixture(mode=mode))
    original = base_state(model)
    first = model(IDS).logits
    second_config = config(mode=mode, channels=20, seed=9, target_modules=ALL)
    model.add_adapter("second", second_config)
    assert (model(IDS).logits - first).abs().max() < 1e-12
    moved(model).set_adapter("second")
    second = model(IDS).logits
    model.base_model.set_adapter(["default", "second"])
    both = model(IDS).logits
    assert (both - second).abs().max() > 1e-3
    model.merge_adapter(adapter_names=["default", "second"])
    assert (model(IDS).logits - both).abs().max() < 1e-12
    model.unmerge_adapter()
    assert_same(base_state(model), original)

    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert (model(IDS).logits - both).abs().max() < 1e-12
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny_model("mixtral", **WIDE), tmp_path / "sum")
    assert (loaded(IDS).logits - both).abs().max() < 1e-12

    model.add_weighted_adapter(["sum", "second"], [1.0, -1.0], "difference")
    model.set_adapter("difference")
    assert (model(IDS).logits - first).abs().max() < 1e-12
    model.delete_adapter("sum")
    model.delete_adapter("default")
    model.set_adapter("second")
    assert (model(IDS).logits - second).abs().max() < 1e-12
    with pytest.raises(ValueError, match="adapter_names: .* is a tensor of experts"):
        model.eval()(input_ids=IDS, adapter_names=["second", "__base__"])
    assert_same(base_state(model.unload()), original)


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_trains_the_same(mode, use_reentrant):
    grads = []
    for checkpointing in (False, True):
        model = randomized(mixture(mode=mode, target_modules=ALL)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([delta.grad for delta in deltas(model).values()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ("permute", "gather"))
def test_a_disabled_pass_between_forward_and_backward_changes_no_gradient(mode, layout):
    model = randomized(mixture(mode=mode, layout=layout, target_modules=ALL))
    reference = tiny_model("mixtral", **WIDE)(IDS).logits
    model(input_ids=IDS, labels=IDS).loss.backward()
    want = {name: delta.grad.clone() for name, delta in deltas(model).items()}
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    with model.disable_adapter(), torch.no_grad():
        assert (model(IDS).logits - reference).abs().max() <= 1e-12
    loss.backward()
    for name, delta in deltas(model).items():
        torch.testing.assert_close(delta.grad, want[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("first", ("base", "both"))
def test_a_pass_of_the_slices_written_later_changes_no_gradient(first):
    model = mixture(layout="gather", target_modules=ALL)
    model.add_adapter("second", config(seed=7, layout="gather", target_modules=ALL))
    assert_own_gradient_despite_a_later_pass(randomized(model), first)


class _Largest(TorchDispatchMode):
    """The most numbers of any floating result that is no view of `known`."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            if out.untyped_storage()._cdata not in self.known:
                self.numel = max(self.numel, out.numel())
        return out


@EVERY_COMBINATION
def test_no_gradient_of_a_whole_expert_tensor_is_computed(mode, layout):
    """Nothing that a step makes is larger than the largest slice."""
    ids = IDS[:1, :4]

    def largest(model):
        model(ids)  # base slices are taken once
        with _Largest(model.parameters()) as mode:
            model(input_ids=ids, labels=ids).loss.backward()
        return mode.numel

    model = randomized(mixture(mode=mode, layout=layout, target_modules=ALL, channels=64))
    slices = [delta.numel() for delta in deltas(model).values()]
    assert max(slices) == 4 * 128 * 32
    assert largest(model) == max(slices)
    assert largest(tiny_model("mixtral", **WIDE)) == 4 * 384 * 32


@pytest.mark.parametrize("mode", MODES)
def test_saved_activations_are_no_more_than_the_floor_and_the_slices(mode):
    """The floor: the frozen model, its experts as transformers runs them by default."""
    ids = token_ids(batch=4, length=16)

    def saved(model):
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        model.train()(ids)  # the base slices exist from the first forward on
        kept = kept_by(lambda: model(input_ids=ids, labels=ids).loss, model)
        assert kept.unseen == 0
        return kept.saved

    floor = tiny_model("mixtral", torch.float32, **WIDE).requires_grad_(False)
    floor.set_experts_implementation("grouped_mm")
    both = []
    for targets in (["o_proj", "down_proj"], ["o_proj", "down_proj", "gate_up_proj"]):
        model = tiny_model("mixtral", torch.float32, **WIDE)
        both.append(saved(get_peft_model(model, config(mode=mode, target_modules=targets))))
    tokens, itemsize, blocks = 4 * 16, 4, 2
    # in-slices: 2 heads of 4 channels for each token, 64 channels for each of its two experts
    assert both[0] <= saved(floor) + blocks * tokens * (2 * 4 + 2 * 64) * itemsize
    # out-slices: the tokens that enter the experts, once
    assert both[1] == both[0] + blocks * tokens * 32 * itemsize


@pytest.mark.parametrize("experts", ("grouped_mm", "batched_mm"))
def test_other_implementations_of_the_experts_give_the_same(experts):
    """In bf16, where ours are a grouped GEMM, too."""
    outputs = []
    for implementation in ("eager", experts):
        model = tiny_model("qwen3_moe", torch.bfloat16, **WIDE)
        model.set_experts_implementation(implementation)
        model = randomized(get_peft_model(model, config(target_modules=ALL)), scale=0.1)
        with torch.no_grad():
            outputs.append(model(IDS).logits.float())
        loss = model(input_ids=IDS, labels=IDS)
        outputs.append(loss.logits.detach().float())
        loss.loss.backward()
        assert all(delta.grad.abs().sum() > 0 for delta in deltas(model).values())
    exact = get_peft_model(tiny_model("qwen3_moe", **WIDE), config(target_modules=ALL))
    exact = randomized(exact, scale=0.1)(IDS).logits.float()
    eager = (outputs[0] - exact).abs().max()
    for output in outputs[1:]:
        assert (output - exact).abs().max() <= 2 * eager


@pytest.mark.parametrize("layout", ("permute", "gather"))
def test_the_triton_kernels_train_experts(layout, device, monkeypatch):
    """Every op of a step from `s2kernels.kernels`, as accurate as torch; the base comes back."""
    ids = IDS[:1, :4].to(device)
    results = []
    double, single = torch.float64, torch.float32
    for dtype, ops in ((double, reference), (single, reference), (single, kernels)):
        monkeypatch.setattr(backend, "select", lambda x, impl=None, ops=ops: ops)
        model = tiny_model("mixtral", dtype).to(device)
        original = base_state(model)
        targets = ["experts.down_proj", "experts.gate_up_proj"]
        fields = dict(mode="inplace", layout=layout, channels=5, target_modules=targets)
        model = randomized(get_peft_model(model, config(**fields)))
        model(input_ids=ids, labels=ids).loss.backward()
        results.append([delta.grad for delta in deltas(model).values()])
        assert_same(base_state(model), original)
    for exact, eager, got in zip(*results, strict=True):
        assert_as_accurate(got, exact, eager)


@pytest.mark.parametrize("largest", (True, False), ids=("large", "small"))
@pytest.mark.parametrize("strategy", ("weight", "activation", "product", "gradient"))
def test_scores_choose_within_each_expert(strategy, largest, tmp_path):
    model = tiny_model("qwen3_moe")
    values = scores(model, strategy, [IDS], progress=False)[EXPERTS]
    chosen = config(selection=strategy, largest=largest, channels=5, target_modules=ALL)
    chosen = select_indices(model, chosen, [IDS], progress=False)
    units = ranked_units({"e": values}, {"e": 5}, largest=largest, num_experts={"e": 4})["e"].view(
        4, 5
    )
    for expert, part in enumerate(values.view(4, 24)):
        best = part.sort(descending=largest, stable=True).indices[:5].sort().values
        assert (units[expert] - 24 * expert).tolist() == best.tolist()
    assert chosen.indices[f"{EXPERTS}.down_proj"] == (units % 24).tolist()
    both = torch.cat([units % 24, units % 24 + 24], dim=1)
    assert chosen.indices[f"{EXPERTS}.gate_up_proj"] == both.tolist()
    model = randomized(get_peft_model(model, chosen))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["indices"][f"{EXPERTS}.down_proj"] == (units % 24).tolist()
    loaded = PeftModel.from_pretrained(tiny_model("qwen3_moe"), tmp_path)
    assert (loaded(IDS).logits - model(IDS).logits).abs().max() < 1e-12


def test_targets_of_one_mixture_may_draw_apart_and_have_budgets():
    fields = dict(coupled=False, channels=5, budget_pattern={"gate_up_proj": 0.1}, heads=1)
    losses = []
    for layout in ("auto", "gather"):
        model = get_peft_model(
            tiny_model("mixtral"), config(**fields, target_modules=ALL, layout=layout)
        )
        found = {
            m.name: m.s2ft_index["default"]
            for m in model.modules()
            if isinstance(m, S2FTExpertTensor)
        }
        assert found[f"{EXPERTS}.down_proj"].shape == (4, 5)
        assert found[f"{EXPERTS}.gate_up_proj"].shape == (4, 8)
        losses.append(train(model.train(), steps=5))
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    down = found[f"{EXPERTS}.down_proj"][0].tolist()
    assert not set(found[f"{EXPERTS}.gate_up_proj"][0, :4].tolist()) <= set(down)
