import itertools
from dataclasses import replace

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODEL_TYPES, tiny_model, token_ids

from s2kernels.architectures import Member
from s2kernels.coupling import Structure, channels_of_heads, parameter, structures
from s2kernels.permute import Permutation, apply_, plan
from s2kernels.select import random_units

ABSOLUTE_POSITIONS = ("opt", "bert", "roberta")
KEY_BIASES = ("k_proj.bias", "self.key.bias")
GROUPED = [t for t in MODEL_TYPES if t not in (*ABSOLUTE_POSITIONS, "gpt2", "gpt_neox")]


def attention(num_heads: int, num_kv_heads: int, head_dim: int = 1) -> Structure:
    return Structure("attn", "attention", (), num_heads, num_kv_heads, head_dim)


def ffn(num_channels: int) -> Structure:
    return Structure("mlp", "ffn", (), num_channels=num_channels)


def permutations(model, seed: int) -> dict[str, tuple[Structure, Permutation, torch.Tensor]]:
    """A plan for every structure, that moves all kinds of its units. Channels are random. Of the
    heads, layer 0 selects two KV groups in part and one wholly if there are more, layer 1 a part of
    one; where each query head has its own KV head, three of them and one.
    """
    plans = {}
    for name, structure in structures(model).items():
        if structure.kind != "attention":
            units = random_units(seed, name, structure.count("channel"), 13)
        else:
            group = structure.num_heads // structure.num_kv_heads
            heads = torch.arange(structure.num_heads)
            if ".0" in name:
                whole = (heads // group == 2) & (structure.num_kv_heads > 2)
                units = heads[(heads == 0) | whole | (heads == structure.num_heads - 1)]
            else:
                units = heads[-max(group - 1, 1) :]
        permutation = plan(structure, units)
        assert permutation is not None
        plans[name] = structure, permutation, units
    return plans


def moves(permutation: Permutation, member: Member) -> bool:
    order = permutation.channels(member)
    return not torch.equal(order, torch.arange(len(order), dtype=torch.int32))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_apply_leaves_the_model_as_it_was(model_type):
    model = tiny_model(model_type)
    tokens = token_ids()
    logits = model(tokens).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storage = {name: value.data_ptr() for name, value in model.state_dict().items()}

    plans = permutations(model, seed=3)
    assert len(plans) == 4
    for name, (structure, permutation, units) in plans.items():
        assert (permutation.start > 0) == (structure.num_kv_heads in (2, 4) and ".0" in name)
        apply_(model, structure, permutation)
        if structure.kind == "experts":
            assert_experts_moved(model, structure, units, before)
            continue
        # what is trained of an in-slice is one run, and every slice holds what it should
        width = structure.width(structure.unit)
        run = torch.arange(permutation.start * width, (permutation.start + len(units)) * width)
        for member in structure.members:
            channels = structure.channels(member, units)
            working = permutation.to_working(channels, member)
            assert torch.equal(permutation.to_original(working, member), channels)
            value = parameter(model, structure, member)
            slice_before = before[f"{name}.{member.suffix}"].index_select(member.axis, channels)
            assert torch.equal(value.index_select(member.axis, working), slice_before)
            if member.dim == "in":
                assert torch.equal(channels, channels_of_heads(units, width))
                assert torch.equal(working.sort().values, run.int())

    for name, value in model.state_dict().items():
        assert value.data_ptr() == storage[name]
        moved = any(
            name == f"{structure.name}.{member.suffix}"
            for structure, permutation, _ in plans.values()
            for member in structure.members
            if moves(permutation, member)
        )
        if moved:
            assert not torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, before[name]), name
    assert (model(tokens).logits - logits).abs().max() <= 1e-10

    for structure, permutation, _ in plans.values():
        apply_(model, structure, permutation.inverse())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(model(tokens).logits, logits)


def assert_experts_moved(model, structure, units, before) -> None:
    """The selected channels of each expert come first, the other ones follow."""
    gate_up, down = (before[f"{structure.name}.{name}_proj"] for name in ("gate_up", "down"))
    experts = model.get_submodule(structure.name)
    size = structure.num_channels
    for expert in range(structure.num_experts):
        chosen = [int(unit) % size for unit in units if unit // size == expert]
        order = chosen + [channel for channel in range(size) if channel not in chosen]
        assert torch.equal(experts.down_proj[expert], down[expert][:, order])
        assert torch.equal(experts.gate_up_proj[expert, :size], gate_up[expert][order])
        assert torch.equal(experts.gate_up_proj[expert, size:], gate_up[expert, size:][order])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_every_parameter_of_the_table_has_to_move(model_type):
    """The bound of 1e-10 above means something: it is broken if one of them stays where it is."""
    model = tiny_model(model_type)
    tokens = token_ids()
    logits = model(tokens).logits
    for structure, permutation, _ in permutations(model, seed=3).values():
        for left in [member for member in structure.members if moves(permutation, member)]:
            rest = tuple(member for member in structure.members if member is not left)
            apply_(model, replace(structure, members=rest), permutation)
            change = (model(tokens).logits - logits).abs().max()
            apply_(model, replace(structure, members=rest), permutation.inverse())
            if model_type in ABSOLUTE_POSITIONS and left.suffix in KEY_BIASES:
                assert change <= 1e-10  # it adds the same number to all scores of a query
            else:
                assert change > 1e-5, (structure.name, left)
    assert torch.equal(model(tokens).logits, logits)


@pytest.mark.parametrize("model_type", GROUPED)
@torch.no_grad()
def test_an_illegal_move_would_be_seen(model_type):
    """One exchange across KV groups breaks the model."""
    model = tiny_model(model_type)
    tokens = token_ids()
    logits = model(tokens).logits
    structure = structures(model)["model.layers.1.self_attn"]
    heads = torch.arange(structure.num_heads)
    heads[[0, -1]] = heads[[-1, 0]]
    orders = {"query_head": heads, "kv_head": torch.arange(structure.num_kv_heads)}
    apply_(model, structure, Permutation(orders, structure.head_dim))
    assert (model(tokens).logits - logits).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_apply_inverse_restores_every_bit_in_low_precision(dtype):
    model = tiny_model("llama", dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plans = permutations(model, seed=5).values()
    for structure, permutation, _ in plans:
        apply_(model, structure, permutation)
    for structure, permutation, _ in plans:
        apply_(model, structure, permutation.inverse())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_apply_is_seen_by_autograd():
    model = tiny_model("mistral")
    structure, permutation, _ = permutations(model, seed=0)["model.layers.1.mlp"]
    loss = model(token_ids()).logits.sum()
    apply_(model, structure, permutation)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["model.layers.0.self_attn", "model.layers.0.mlp"])
def test_a_failed_apply_leaves_the_model_as_it_was(name):
    model = tiny_model("llama")
    structure, permutation, _ = permutations(model, seed=0)[name]
    # the last member refuses to be written: its elements share memory
    last = parameter(model, structure, structure.members[-1])
    last.data = last.data[:1].expand_as(last.data)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    versions = {key: value._version for key, value in model.named_parameters()}
    with pytest.raises(RuntimeError, match="single memory location"):
        apply_(model, structure, permutation)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    # and the test is one: all members but the last were written, and written back
    touched = {key for key, value in model.named_parameters() if value._version != versions[key]}
    assert touched == {f"{name}.{member.suffix}" for member in structure.members[:-1]}


def test_apply_refuses_before_anything_changes():
    model = tiny_model("qwen2")
    found = structures(model)
    self_attn, mlp = found["model.layers.0.self_attn"], found["model.layers.0.mlp"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="orders 39 channels of unit channel, .*0.mlp has 40"):
        apply_(model, mlp, plan(ffn(39), torch.tensor([3])))
    with pytest.raises(ValueError, match="orders 64 channels of unit query_head, .* has 32"):
        apply_(model, self_attn, plan(attention(16, 4, 4), torch.tensor([3])))
    with pytest.raises(ValueError, match="one of channel, got 'query_head'"):
        apply_(model, self_attn, plan(ffn(40), torch.tensor([3])))
    mixture = tiny_model("mixtral")
    experts = structures(mixture)["model.layers.0.mlp.experts"]
    with pytest.raises(ValueError, match="has the orders of 1 experts, .*experts has 4"):
        apply_(mixture, experts, plan(ffn(160), torch.tensor([3])))
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="0.mlp cannot be permuted: up_proj.weight is shared"):
        apply_(model, mlp, plan(mlp, torch.tensor([3])))
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(
        before["model.layers.1.mlp.up_proj.weight"]
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_plan_of_channels():
    permutation = plan(ffn(6), torch.tensor([1, 4, 5]))
    assert permutation.orders["channel"].tolist() == [1, 4, 5, 0, 2, 3]
    assert permutation.start == 0
    working = permutation.to_working(torch.tensor([5, 0, 1]), "channel")
    assert (working.tolist(), working.dtype) == ([2, 3, 0], torch.int32)
    original = permutation.to_original(torch.tensor([2, 3, 0], dtype=torch.int32), "channel")
    assert (original.tolist(), original.dtype) == ([5, 0, 1], torch.int32)


def test_plan_of_experts():
    """Each expert's selected channels come first among its own."""
    experts = Structure("moe", "experts", (), num_channels=4, num_experts=3)
    permutation = plan(experts, torch.tensor([1, 3, 10]))
    assert permutation.orders["channel"].tolist() == [1, 3, 0, 2, 4, 5, 6, 7, 10, 8, 9, 11]
    working = permutation.to_working(torch.tensor([3, 10, 4]), "channel")
    assert working.tolist() == [1, 8, 4]
    gate_up = Member("gate_up_proj", ("channel", "channel"), 1)
    assert permutation.channels(gate_up).tolist() == [
        *(1, 3, 0, 2, 5, 7, 4, 6),  # gate and up of the first expert
        *(8, 9, 10, 11, 12, 13, 14, 15),
        *(18, 16, 17, 19, 22, 20, 21, 23),
    ]
    back = permutation.inverse()
    assert back.num_experts == 3
    assert back.to_working(working, "channel").tolist() == [3, 10, 4]


def test_translation_on_fused_axes():
    permutation = plan(attention(4, 2, head_dim=2), torch.tensor([3]))
    assert permutation.orders["query_head"].tolist() == [3, 2, 0, 1]
    qkv = Member("qkv.weight", ("query_head", "kv_head", "kv_head"), 0)
    order = [6, 7, 4, 5, 0, 1, 2, 3, 10, 11, 8, 9, 14, 15, 12, 13]
    assert permutation.channels(qkv).tolist() == order
    assert permutation.to_working(torch.tensor([6, 11, 12]), qkv).tolist() == [0, 9, 14]
    assert permutation.to_original(torch.tensor([0, 9, 14]), qkv).tolist() == [6, 11, 12]
    interleaved = Member("qkv.weight", ("query_head",), 0, blocks=3)
    assert permutation.channels(interleaved).tolist() == [
        6 * head + i for head in (3, 2, 0, 1) for i in range(6)
    ]
    with pytest.raises(ValueError, match="positions from 0 to 15 wanted, got 16 to 16"):
        permutation.to_working(torch.tensor([16]), qkv)


@pytest.mark.parametrize(
    "selected, query_heads, kv_heads, start",
    [
        ([4, 5, 6, 7], [4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11], [1, 0, 2], 0),
        # one partly selected group comes after the whole ones, so the run does not ascend
        ([1, 3, 8, 9, 10, 11], [8, 9, 10, 11, 1, 3, 0, 2, 4, 5, 6, 7], [2, 0, 1], 0),
        # two: the first leads, its selected heads last
        ([1, 4, 5, 6, 7, 8, 10], [0, 2, 3, 1, 4, 5, 6, 7, 8, 10, 9, 11], [0, 1, 2], 3),
        ([4, 5, 9], [6, 7, 4, 5, 9, 8, 10, 11, 0, 1, 2, 3], [1, 2, 0], 2),
    ],
)
def test_plan_of_heads(selected, query_heads, kv_heads, start):
    permutation = plan(attention(12, 3, head_dim=2), torch.tensor(selected))
    assert permutation.orders["query_head"].tolist() == query_heads
    assert permutation.orders["kv_head"].tolist() == kv_heads
    assert permutation.start == start
    # channels move with their heads
    assert permutation.channels("kv_head").tolist() == [
        2 * head + i for head in kv_heads for i in range(2)
    ]


@pytest.mark.parametrize("num_heads, num_kv_heads", [(6, 3), (6, 2), (4, 4), (4, 1)])
def test_plan_finds_a_run_exactly_where_brute_force_does(num_heads, num_kv_heads):
    group = num_heads // num_kv_heads
    legal = {
        tuple(g * group + i for g, inner in zip(groups, inners, strict=True) for i in inner)
        for groups in itertools.permutations(range(num_kv_heads))
        for inners in itertools.product(
            list(itertools.permutations(range(group))), repeat=num_kv_heads
        )
    }
    impossible = 0
    for count in range(1, num_heads + 1):
        for selected in itertools.combinations(range(num_heads), count):
            starts = {
                start
                for order in legal
                for start in range(num_heads - count + 1)
                if set(order[start : start + count]) == set(selected)
            }
            permutation = plan(attention(num_heads, num_kv_heads), torch.tensor(selected))
            assert (permutation is None) == (not starts)
            if permutation is None:
                impossible += 1
                continue
            order = tuple(permutation.orders["query_head"].tolist())
            assert order in legal
            assert permutation.orders["kv_head"].tolist() == [h // group for h in order[::group]]
            assert permutation.start in starts
            assert (permutation.start == 0) == (0 in starts)
            run = order[permutation.start : permutation.start + count]
            assert set(run) == set(selected)
    assert impossible == (8 if (num_heads, num_kv_heads) == (6, 3) else 0)


@st.composite
def selections(draw) -> tuple[Structure, torch.Tensor]:
    if draw(st.booleans()):
        structure = ffn(draw(st.integers(1, 60)))
    else:
        groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 4))
        structure = attention(groups * size, groups, draw(st.integers(1, 3)))
    units = st.integers(0, structure.count(structure.unit) - 1)
    chosen = draw(st.sets(units, min_size=1))
    return structure, torch.tensor(sorted(chosen), dtype=draw(st.sampled_from([torch.int32, None])))


@settings(max_examples=200)
@given(selections())
def test_translation(selection):
    structure, units = selection
    permutation = plan(structure, units)
    if permutation is None:
        return
    for unit, order in permutation.orders.items():
        total = structure.count(unit)
        assert order.sort().values.tolist() == list(range(total))
        channels = torch.arange(total * structure.width(unit))
        working = permutation.to_working(channels, unit)
        assert torch.equal(permutation.to_original(working, unit), channels.int())
        assert torch.equal(permutation.inverse().to_working(working, unit), channels.int())
        assert torch.equal(permutation.inverse().inverse().orders[unit], order)
    width = structure.width(structure.unit)
    working = permutation.to_working(channels_of_heads(units, width), structure.unit)
    start, count = permutation.start * width, len(units) * width
    assert working.sort().values.tolist() == list(range(start, start + count))


@pytest.mark.parametrize(
    "selected, error, message",
    [
        ([1, 2], TypeError, "selected_units of mlp: an int32 or int64 tensor wanted, got list"),
        (torch.tensor([0.0, 1.0]), TypeError, "got torch.float32"),
        (torch.tensor([True, False]), TypeError, "got torch.bool"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"n > 0 wanted, got \(0,\)"),
        (torch.tensor([[1, 2]]), ValueError, r"got \(1, 2\)"),
        (torch.tensor([1, 3, 2]), ValueError, "strictly ascending .* got 3 before 2"),
        (torch.tensor([1, 1]), ValueError, "strictly ascending .* got 1 before 1"),
        (torch.tensor([-1, 1]), ValueError, "positions from 0 to 7 wanted, got -1 to 1"),
        (torch.tensor([1, 8]), ValueError, "positions from 0 to 7 wanted, got 1 to 8"),
    ],
)
def test_plan_refuses(selected, error, message):
    with pytest.raises(error, match=message):
        plan(ffn(8), selected)


def test_translation_refuses():
    permutation = plan(attention(4, 2, head_dim=2), torch.tensor([1]))
    with pytest.raises(ValueError, match="positions from 0 to 3 wanted, got 0 to 4"):
        permutation.to_working(torch.tensor([0, 4]), "kv_head")
    with pytest.raises(ValueError, match="positions from 0 to 7 wanted, got -1 to 1"):
        permutation.to_original(torch.tensor([-1, 1]), "query_head")
    with pytest.raises(ValueError, match="one of query_head, kv_head, got 'channel'"):
        permutation.to_working(torch.tensor([0]), "channel")
    with pytest.raises(TypeError, match="index: .* got torch.float32"):
        permutation.to_working(torch.tensor([0.0]), "kv_head")
    assert permutation.to_working(torch.tensor([], dtype=torch.int32), "kv_head").shape == (0,)


def test_plan_under_another_default_device():
    """Models are built under `torch.device("meta")`; plans hold values even so."""
    with torch.device("meta"):
        structure, units = attention(6, 3), torch.tensor([1, 2, 3], device="cpu")
        permutation = plan(structure, units)
        assert permutation.to_working(units, "query_head").tolist() == [2, 0, 1]
