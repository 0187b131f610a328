"""The methods side by side: each trains what its budget says, that alone, and the right way."""

import copy
import importlib.util

import pytest
import torch
from numerics import assert_as_accurate
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model, token_ids
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.measure import memory
from bench.methods import METHODS, Budget, Options, Unavailable, comparable
from bench.methods.adapters import LINEARS, random_mask
from bench.methods.lora_fused import SCALE, LoRAFused
from bench.methods.loreft import Edit, edited_positions
from bench.steps.model_shapes import TABLE
from s2kernels import backend

NAMES = tuple(METHODS)
# Full fine-tuning, LISA and LoReFT cannot choose how much they train.
COMPARABLE = [name for name in NAMES if name not in ("frozen", "full", "lisa", "loreft")]
# What is left are DoRA's magnitudes, and the rounding of heads and of GaLore's rank.
TOLERANCE = 0.05
TRAINED = tuple(name for name in NAMES if name != "frozen")
BUDGET = Budget(heads=1, channels=5, rank=3, seed=0, shira_rank=2, galore_rank=4, lisa_interval=3)
CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


@pytest.fixture
def batch():
    return torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(1))


def start(name, base, lr=1e-2, options=None, budget=BUDGET):
    """The method at work on a copy of `base`; skips where its package is missing."""
    try:
        return METHODS[name](copy.deepcopy(base), budget, lr, options or Options())
    except Unavailable as reason:
        pytest.skip(str(reason))


def gradients(method, batch):
    method.zero_grad()
    method.loss(batch).backward()
    return {name: parameter.grad for name, parameter in method.named_trained()}


def test_trained_parameters_are_those_of_the_budget(base):
    hidden, wide, layers = 24, 36, 4
    linears = [(24, 24), (12, 24), (12, 24), (24, 24), (wide, 24), (wide, 24), (24, wide)]
    lora = 3 * layers * sum(n + k for n, k in linears)
    s2ft = layers * hidden * (6 + 5)  # a head of 6 channels, 5 channels of the FFN
    block = sum(n * k for n, k in linears) + 2 * hidden
    expected = {
        "frozen": 0,
        "full": base.num_parameters(),
        **dict.fromkeys(("lora", "lora_fp32", "lora_fused"), lora),
        "dora": lora + layers * sum(n for n, _ in linears),
        "galore": 4 * layers * sum(max(n, k) for n, k in linears),
        "lisa": 2 * 40 * hidden + 2 * block,
        "loreft": layers * (2 * 8 * hidden + 8),
        "shira": 2 * layers * sum(n + k for n, k in linears),
        **{name: s2ft for name in NAMES if name.startswith("s2ft")},
    }
    for name, number in expected.items():
        assert start(name, base).trained_parameters() == number, name
    # of each layer a whole number of entries
    for name in ("spiel", "spiel_ma"):
        assert lora - 28 <= start(name, base).trained_parameters() <= lora


@pytest.mark.parametrize("name", NAMES)
def test_step_changes_what_is_trained_and_nothing_else(name, base, batch):
    method = start(name, base)
    names = {name for name, _ in method.named_trained()}
    before = {name: value.clone() for name, value in method.model.named_parameters()}
    for _ in range(2):  # LoRA's A does not move in the first step: B is zero
        method.step(batch)
    assert {name for name, _ in method.named_trained()} == names
    after = dict(method.model.named_parameters())
    assert after.keys() == before.keys()
    if name.startswith(("s2ft", "spiel")):  # W0 comes back when it is unloaded
        assert not any(torch.equal(after[name], before[name]) for name in names)
        unloaded = method.model.unload().state_dict()
        assert all(torch.equal(unloaded[key], value) for key, value in base.state_dict().items())
        return
    for key, value in after.items():
        assert torch.equal(value, before[key]) == (key not in names), key


@pytest.mark.parametrize("name", NAMES)
def test_loss_of_a_fixed_batch_falls(name, base, batch):
    method = start(name, base)
    losses = [float(method.step(batch)) for _ in range(5)]  # then SpIEL drops all of its entries
    if name == "frozen":
        assert len(set(losses)) == 1
    else:
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize("name", TRAINED)
def test_checkpointing_gives_the_same_gradients(name, base, batch):
    plain = gradients(start(name, base), batch)
    method = start(name, base, options=Options(checkpointing=True))
    found = gradients(method, batch)
    assert found.keys() == plain.keys()
    for key, grad in plain.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["frozen", "lora_fused", "loreft", "s2ft_inplace"])
def test_checkpointing_keeps_the_inputs_of_the_blocks(name, base, batch):
    def saved(options):
        method = start(name, base, options=options)
        method.step(batch)
        return memory.kept_by(lambda: method.loss(batch), method.model).saved

    plain, checkpointed = saved(Options(full_depth=True)), saved(Options(True, full_depth=True))
    assert checkpointed < plain / 2


@pytest.mark.parametrize("name", TRAINED)
def test_full_depth_computes_dx_down_to_the_embedding(name, base, batch):
    def bottom(method):
        outputs = []
        embedding = method.base.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out: outputs.append(out))
        loss = method.loss(batch)
        (output,) = outputs
        if output.requires_grad:
            output.retain_grad()
        loss.backward()
        return output.grad

    method = start(name, base, options=Options(full_depth=True))
    assert bottom(method).abs().max() > 0
    method.full_depth = False
    trains_embedding = name in ("full", "lisa")
    assert (bottom(method) is not None) == trains_embedding


def test_frozen_computes_dx_whatever_the_options(base, batch):
    method = start("frozen", base)
    assert method.full_depth and method.optimizer is None and method.trained() == []
    method.loss(batch).backward()  # would raise without dx
    method.update()


def trained_by(shape, budget) -> dict[str, int]:
    """Trained parameters of every comparable method, in a model of `shape`."""
    model = shape.build(8, torch.bfloat16, "cpu")
    return {name: start(name, model, budget=budget).trained_parameters() for name in COMPARABLE}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [16, 64])
def test_comparable_methods_train_as_much_as_lora(rank):
    """One layer of a published model: all others are like it."""
    shape = TABLE["qwen3-0.6b"].cut(1, vocab=64)
    budget = comparable(shape.config(8), rank=rank)
    assert budget.rank == rank and budget.channels % 8 == 0
    trained = trained_by(shape, budget)
    for name in COMPARABLE:
        assert trained[name] == pytest.approx(trained["lora"], rel=TOLERANCE), name


def test_comparable_methods_train_the_share():
    shape = TABLE["small"].cut(2)
    trained = trained_by(shape, comparable(shape.config(8), share=0.05))
    for name in COMPARABLE:
        assert trained[name] == pytest.approx(0.05 * shape.parameters(), rel=TOLERANCE), name


def test_comparable_without_room_for_a_head_trains_channels(base, batch):
    budget = comparable(TABLE["llama-2-7b"].config(64), share=2e-4)
    assert budget.heads == 0 and budget.channels > 0
    few = comparable(CONFIG, share=0.004)
    assert (few.heads, few.channels) == (0, 1)
    method = start("s2ft_inplace", base, budget=few)
    assert method.trained_parameters() == 4 * 24


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"rank": 0}, "rank must be 1 at least, got 0"),
        ({"share": 1.5}, r"share must lie in \(0, 1\), got 1.5"),
    ],
)
def test_comparable_rejects(sizes, message):
    with pytest.raises(ValueError, match=message):
        comparable(CONFIG, **sizes)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_lora_fused_is_lora(model_type, joined, monkeypatch):
    """Loss, gradients of A and B, and dx in fp64 against PEFT; biases and odd sizes included."""
    monkeypatch.setattr(backend, "prefers_joined", lambda weight: joined)
    model = tiny_model(model_type)
    budget = Budget(heads=1, channels=1, rank=3, seed=0)
    fused = LoRAFused(copy.deepcopy(model), budget, 1e-3, Options(full_depth=True))
    config = LoraConfig(r=3, lora_alpha=3 * SCALE, target_modules=list(LINEARS))
    peft = get_peft_model(copy.deepcopy(model), config)
    inputs = []
    for each in (fused.model, peft):
        embedding = each.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out: inputs.append(out))
    peft.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_(True))
    pairs = [
        pair
        for ours, theirs in zip(fused.model.model.layers, peft.model.model.layers, strict=True)
        for pair in adapter_pairs(ours, theirs)
    ]
    with torch.no_grad():
        for (A, Bt), (their_A, their_B) in pairs:
            for value in (A, Bt):
                value.copy_(torch.randn(value.shape, dtype=value.dtype) / 4)
            their_A.copy_(A), their_B.copy_(Bt.t())

    batch = token_ids()
    loss, expected = fused.loss(batch), peft(input_ids=batch, labels=batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    wanted = [*fused.trained(), inputs[0]]
    kept = torch.autograd.grad(loss, wanted, retain_graph=True)
    grads = torch.autograd.grad(loss, wanted)  # writes over gate and up, which the other had kept
    assert all(map(torch.equal, grads, kept))
    by_parameter = dict(zip([*map(id, fused.trained()), "dx"], grads, strict=True))
    expected.backward()
    for layer_pairs in zip(fused.model.model.layers, peft.model.model.layers, strict=True):
        found = adapter_pairs(*layer_pairs, grads=by_parameter)
        for (dA, dBt), (their_A, their_B) in found:
            torch.testing.assert_close(dA, their_A.grad, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(dBt.t(), their_B.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_parameter["dx"], inputs[1].grad, rtol=1e-9, atol=1e-12)


def adapter_pairs(ours, theirs, grads=None):
    """((A, Bt), (A, B)) of the linears of one block, of the fused stacks and of PEFT.

    With grads, gradients by the identity of the parameter, the first two are these of A and Bt.
    """
    qkv, o = ours.self_attn.q_proj, ours.self_attn.o_proj
    stacks = {
        ("q_proj", "k_proj", "v_proj"): qkv,
        ("o_proj",): o,
        ("gate_proj", "up_proj"): ours.mlp.gate_up,
        ("down_proj",): ours.mlp.down,
    }
    for names, stack in stacks.items():
        A, Bt = (p if grads is None else grads[id(p)] for p in (stack.A, stack.Bt))
        parts = zip(names, A.split(len(Bt)), Bt.split(stack.sizes, 1), strict=True)
        for name, a, bt in parts:
            owner = theirs.self_attn if hasattr(theirs.self_attn, name) else theirs.mlp
            linear = getattr(owner, name)
            yield (a, bt), (linear.lora_A["default"].weight, linear.lora_B["default"].weight)


def test_lora_fused_holds_and_saves_nothing_twice(base, batch):
    fused, peft = start("lora_fused", base), start("lora", base)
    held = [memory.total_bytes(memory.model_tensors(m.model)) for m in (fused, peft)]
    assert held[0] == held[1]
    for method in (fused, peft):
        method.step(batch)
    kept = [memory.kept_by(lambda m=m: m.loss(batch), m.model) for m in (fused, peft)]
    assert kept[0].unseen == 0 and kept[0].saved < kept[1].saved


def test_lora_fused_is_as_accurate_as_peft_in_half(base, batch):
    """dx at the embedding in bf16: the error against fp64 is at most twice PEFT's."""

    def dx(name, dtype):
        model = copy.deepcopy(base).to(dtype)
        method = start(name, model, options=Options(full_depth=True))
        with torch.no_grad():
            for key, value in method.named_trained():
                fused_B, peft_B = key.endswith("Bt"), "lora_B" in key
                if fused_B or peft_B:
                    value.fill_(0.01)
                else:
                    value.copy_(torch.linspace(-1, 1, value.shape[1]).expand_as(value))
        outputs = []
        embedding = method.base.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out: outputs.append(out))
        method.loss(batch).backward()
        return outputs[0].grad

    exact = dx("lora", torch.float64)
    assert_as_accurate(dx("lora_fused", torch.bfloat16), exact, dx("lora", torch.bfloat16))


def test_lora_dtypes(base):
    half = copy.deepcopy(base).to(torch.bfloat16)
    for name in ("lora", "lora_fused", "dora", "shira"):
        assert {p.dtype for p in start(name, half).trained()} == {torch.bfloat16}, name
    assert {p.dtype for p in start("lora_fp32", half).trained()} == {torch.float32}


def trained_layers(method):
    names = (name.split(".") for name, _ in method.named_trained() if ".layers." in name)
    return frozenset(int(parts[2]) for parts in names)


def test_lisa_draws_anew_and_drops_states(base, batch):
    method = start("lisa", base)
    assert method.period == 3
    draws = set()
    for step in range(1, 31):
        trained = {name for name, _ in method.named_trained()}
        layers = trained_layers(method)
        ends = {"model.embed_tokens.weight", "lm_head.weight"}
        assert ends <= trained and len(layers) == 2
        draws.add(layers)
        before = method.trained()
        method.step(batch)
        after = method.trained()
        optimized = [p for group in method.optimizer.param_groups for p in group["params"]]
        assert set(optimized) == set(after)
        assert set(method.optimizer.state) == set(before) & set(after)
        assert all(p.grad is None for p in method.model.parameters() if not p.requires_grad)
        assert trained_layers(method) == layers or step % 3 == 0
    assert frozenset().union(*draws) == {0, 1, 2, 3} and len(draws) > 2


def test_lisa_draws_when_it_is_made_due(base, batch):
    budget = Budget(heads=1, channels=1, rank=1, seed=0, lisa_layers=1, lisa_interval=1000)
    method = start("lisa", base, budget=budget)
    draws = set()
    for _ in range(12):
        method.make_due()
        method.step(batch)
        last = trained_layers(method)
        draws.add(last)
        method.step(batch)
        assert trained_layers(method) == last
    assert len(draws) > 1


def test_lisa_is_due_at_a_draw_and_right_after(base, batch):
    method = start("lisa", base, budget=BUDGET)
    due = []
    for _ in range(8):
        due.append(method.is_due())
        method.step(batch)
    assert method.period == 3 and due == [True, False, True, True, False, True, True, False]


def test_shira_draws_its_entries_where_the_weight_is(base, batch, monkeypatch):
    """A permutation of all entries of each weight takes minutes for a large model."""
    monkeypatch.setattr("peft.tuners.shira.mask_functions.torch.randperm", None)
    layer = torch.nn.Linear(40, 30)

    def ones(layer, r, seed):
        """The mask as PEFT reads it, dense."""
        rows, columns = torch.where(random_mask(layer, r, seed) == 1.0)
        mask = torch.zeros(layer.weight.shape, dtype=torch.int64)
        return mask.index_put_((rows, columns), torch.ones_like(rows), accumulate=True)

    for r in (2, 17):  # 17 * 70 of the 1200 entries: nearly all
        mask = ones(layer, r, 3)
        assert mask.max() == 1 and mask.sum() == 70 * r
        assert torch.equal(mask, ones(layer, r, 3))
        assert not torch.equal(mask, ones(layer, r, 4))
    rows = ones(torch.nn.Linear(300, 300), 15, 0).sum(1).double()
    assert rows.mean() == 30 and 3 < rows.std() < 8  # sqrt(27) if every entry is as likely
    start("shira", base).step(batch)


def test_galore_moves_weights_in_a_subspace(base, batch):
    method = start("galore", base, budget=Budget(1, 1, 1, 0, galore_rank=3, galore_gap=3))
    before = {name: value.detach().clone() for name, value in method.named_trained()}
    assert len(before) == 7 * 4 and all(".layers." in name for name in before)
    for _ in range(3):  # up to the next decomposition
        method.step(batch)
    for name, value in method.named_trained():
        moved = torch.linalg.svdvals((value.detach() - before[name]).double())
        assert moved[2] > 1e-4 * moved[0] and moved[3] < 1e-4 * moved[0], name


def test_galore_decomposes_when_it_is_due(base, batch):
    method = start("galore", base, budget=Budget(1, 1, 1, 0, galore_rank=3, galore_gap=3))
    assert method.period == 3
    decompositions = []

    def projections():
        return [state["projector"].ortho_matrix for state in method.optimizer.state.values()]

    method.step(batch)
    last = projections()
    for step in range(1, 8):
        if step == 5:
            method.make_due()
        due = method.is_due()
        method.step(batch)
        now = projections()
        changed = {a is not b for a, b in zip(now, last, strict=True)}
        assert changed == {due}  # all or none
        decompositions.append(changed.pop())
        last = now
    assert decompositions == [False, False, True, False, True, True, False]
    states = memory.total_bytes(method.state_tensors())
    assert states > memory.total_bytes(memory.states(method.optimizer)) > 0


def test_loreft_is_its_equation():
    torch.manual_seed(0)
    edit = Edit(hidden=11, rank=3, positions=4, dtype=torch.float64)
    with torch.no_grad():
        edit.source.weight.copy_(torch.randn(3, 11))
        edit.source.bias.copy_(torch.randn(3))
    h = torch.randn(2, 9, 11, dtype=torch.float64)
    out = edit(h)
    R, W, b = edit.rotation.weight, edit.source.weight, edit.source.bias
    torch.testing.assert_close(R @ R.t(), torch.eye(3, dtype=torch.float64))
    for position in range(9):
        x = h[:, position]
        expected = x if position == 4 else x + (x @ W.t() + b - x @ R.t()) @ R
        torch.testing.assert_close(out[:, position], expected)
    assert torch.equal(out[:, 4], h[:, 4])


@pytest.mark.parametrize(
    "length, positions",
    [(9, [0, 1, 2, 6, 7, 8]), (6, [0, 1, 2, 3, 4, 5]), (5, [0, 1, 3, 4]), (1, [])],
)
def test_loreft_positions(length, positions):
    assert edited_positions(length, 3, torch.device("cpu")).tolist() == positions


def test_loreft_edits_every_block_and_stays_orthonormal(base, batch):
    method = start("loreft", base, lr=3e-2)
    for _ in range(4):
        method.step(batch)
    for layer in method.base.model.layers:
        R = layer.loreft.rotation.weight
        torch.testing.assert_close(R @ R.t(), torch.eye(8), rtol=0, atol=1e-5)
    outputs, edited = [], []
    layer = method.base.model.layers[2]
    edit = layer.loreft
    edit.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    method.base.model.layers[3].register_forward_pre_hook(
        lambda module, args: edited.append(args[0])
    )
    method.loss(batch)
    assert torch.equal(edit(outputs[0]), edited[0])
    where = edited_positions(17, 7, torch.device("cpu"))
    moved = (edited[0] - outputs[0]).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == where.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, joined", [("lora_fused", False), ("lora_fused", True), ("s2ft_inplace", False)]
)
def test_compiled_methods_take_the_same_steps(name, joined, batch, monkeypatch):
    """In one graph: traced as torch.compile traces it, and run by eager torch, which is quick."""
    monkeypatch.setattr(backend, "prefers_joined", lambda weight: joined)
    compile_ = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: compile_(self, backend="aot_eager", fullgraph=True)
    )
    torch.manual_seed(0)
    shallow = LlamaForCausalLM(LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 1}))
    torch.compiler.reset()
    losses = []
    for options in (Options(), Options(compile=True)):
        method = start(name, shallow, options=options)
        losses.append([float(method.step(batch)) for _ in range(3)])
    torch.compiler.reset()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_options_reject_an_unknown_attention():
    with pytest.raises(ValueError, match="attention must be one of .* got 'abacus'"):
        Options(attention="abacus")


@pytest.mark.parametrize("options", [Options(liger=True), Options(attention="cudnn")])
def test_options_that_need_a_gpu(options, base):
    if base.device.type == "cuda":
        pytest.skip("there is one")
    model = copy.deepcopy(base)
    with pytest.raises(Unavailable, match="the model is on the device cpu"):
        METHODS["full"](model, BUDGET, 1e-3, options)
    assert all(p.requires_grad for p in model.parameters())  # as it was


def test_galore_without_its_package(base, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "galore_torch" else real(name)
    )
    with pytest.raises(Unavailable, match="galore-torch is not installed"):
        METHODS["galore"](copy.deepcopy(base), BUDGET, 1e-3)


def test_adapters_are_found_by_name(base):
    """A parameter that never changes in a step can be named, in every method."""
    for name in TRAINED:
        method = start(name, base)
        named = dict(method.named_trained())
        assert len(named) == len(method.trained()) > 0
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in named.values())
