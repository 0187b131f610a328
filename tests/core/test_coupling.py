import copy

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny_models import MODEL_TYPES, tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from s2kernels.architectures import TABLE, Member, in_projections
from s2kernels.coupling import (
    base_layer,
    channels_of_heads,
    find,
    obstacle,
    parameter,
    structures,
)


def linear(name: str, unit: str, dim: str = "out", bias: bool = True) -> list[tuple]:
    """What is expected of a torch.nn.Linear: (suffix, units, axis, dim, blocks)."""
    weight = (f"{name}.weight", (unit,), 0 if dim == "out" else 1, dim, 1)
    return [weight, (f"{name}.bias", (unit,), 0, "out", 1)] if bias and dim == "out" else [weight]


def attention(q: str, k: str, v: str, o: str, bias: bool = True) -> list[tuple]:
    return [
        *linear(q, "query_head", bias=bias),
        *linear(k, "kv_head", bias=bias),
        *linear(v, "kv_head", bias=bias),
        *linear(o, "query_head", "in"),
    ]


def gated(bias: bool) -> list[tuple]:
    up = linear("gate_proj", "channel", bias=bias) + linear("up_proj", "channel", bias=bias)
    return up + linear("down_proj", "channel", "in")


QKVO = attention("q_proj", "k_proj", "v_proj", "o_proj")
QKVO_PLAIN = attention("q_proj", "k_proj", "v_proj", "o_proj", bias=False)
QKV = ("query_head", "kv_head", "kv_head")
BERT = {
    "bert.encoder.layer.*.attention": attention(
        "self.query", "self.key", "self.value", "output.dense"
    ),
    "bert.encoder.layer.*": linear("intermediate.dense", "channel")
    + linear("output.dense", "channel", "in"),
}
EXPERTS = [
    ("gate_up_proj", ("channel", "channel"), 1, "out", 1),
    ("down_proj", ("channel",), 2, "in", 1),
]
# the members of every kind of structure, and its (heads, KV heads, head_dim)
EXPECTED = {
    "llama": ((8, 4, 4), {"model.layers.*.self_attn": QKVO, "model.layers.*.mlp": gated(True)}),
    "mistral": (
        (8, 2, 4),
        {"model.layers.*.self_attn": QKVO_PLAIN, "model.layers.*.mlp": gated(False)},
    ),
    "qwen2": ((8, 4, 4), {"model.layers.*.self_attn": QKVO, "model.layers.*.mlp": gated(False)}),
    "qwen3": ((8, 2, 6), {"model.layers.*.self_attn": QKVO, "model.layers.*.mlp": gated(False)}),
    "gemma2": ((8, 4, 6), {"model.layers.*.self_attn": QKVO, "model.layers.*.mlp": gated(False)}),
    "gemma3_text": (
        (8, 2, 6),
        {"model.layers.*.self_attn": QKVO, "model.layers.*.mlp": gated(False)},
    ),
    "phi3": (
        (8, 4, 4),
        {
            "model.layers.*.self_attn": [
                ("qkv_proj.weight", QKV, 0, "out", 1),
                ("o_proj.weight", ("query_head",), 1, "in", 1),
            ],
            "model.layers.*.mlp": [
                ("gate_up_proj.weight", ("channel", "channel"), 0, "out", 1),
                ("down_proj.weight", ("channel",), 1, "in", 1),
            ],
        },
    ),
    "gpt2": (
        (8, 8, 4),
        {
            "transformer.h.*.attn": [
                ("c_attn.weight", QKV, 1, "out", 1),
                ("c_attn.bias", QKV, 0, "out", 1),
                ("c_proj.weight", ("query_head",), 0, "in", 1),
            ],
            "transformer.h.*.mlp": [
                ("c_fc.weight", ("channel",), 1, "out", 1),
                ("c_fc.bias", ("channel",), 0, "out", 1),
                ("c_proj.weight", ("channel",), 0, "in", 1),
            ],
        },
    ),
    "gpt_neox": (
        (8, 8, 4),
        {
            "gpt_neox.layers.*.attention": [
                ("query_key_value.weight", ("query_head",), 0, "out", 3),
                ("query_key_value.bias", ("query_head",), 0, "out", 3),
                ("dense.weight", ("query_head",), 1, "in", 1),
            ],
            "gpt_neox.layers.*.mlp": linear("dense_h_to_4h", "channel")
            + linear("dense_4h_to_h", "channel", "in"),
        },
    ),
    "opt": (
        (8, 8, 4),
        {
            "model.decoder.layers.*.self_attn": attention("q_proj", "k_proj", "v_proj", "out_proj"),
            "model.decoder.layers.*": linear("fc1", "channel") + linear("fc2", "channel", "in"),
        },
    ),
    "bert": ((8, 8, 4), BERT),
    "roberta": (
        (8, 8, 4),
        {name.replace("bert", "roberta"): members for name, members in BERT.items()},
    ),
    "mixtral": (
        (8, 2, 4),
        {"model.layers.*.self_attn": QKVO_PLAIN, "model.layers.*.mlp.experts": EXPERTS},
    ),
    "qwen3_moe": (
        (8, 4, 4),
        {
            "model.layers.*.self_attn": QKVO,
            "model.layers.0.mlp": gated(False),
            "model.layers.1.mlp.experts": EXPERTS,
        },
    ),
}


class TunerLayer(nn.Module):
    """What a tuner leaves at the place of a projection."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.s2ft_delta = nn.ParameterDict({"default": torch.zeros(2, 2)})

    @property
    def weight(self):
        return self.base_layer.weight


def wrap(model: nn.Module, *leaves: str) -> None:
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in leaves:
            model.set_submodule(name, TunerLayer(module))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_structures(model_type):
    model = tiny_model(model_type)
    found = structures(model)
    heads, patterns = EXPECTED[model_type]
    expected = {
        pattern.replace("*", layer): members
        for pattern, members in patterns.items()
        for layer in ("01" if "*" in pattern else "-")
    }
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    assert list(found) == sorted(expected, key=order.__getitem__)
    for name, structure in found.items():
        got = [(m.suffix, m.units, m.axis, m.dim, m.blocks) for m in structure.members]
        assert (structure.name, got) == (name, expected[name])
        is_attention = name.endswith(("attn", "attention"))
        is_experts = name.endswith("experts")
        assert structure.kind == (
            "attention" if is_attention else "experts" if is_experts else "ffn"
        )
        sizes = (structure.num_heads, structure.num_kv_heads, structure.head_dim)
        assert sizes == (heads if is_attention else (0, 0, 0))
        num_channels = 24 if (model_type, is_experts) == ("qwen3_moe", True) else 40
        assert structure.num_channels == (0 if is_attention else num_channels)
        assert structure.num_experts == (4 if is_experts else 1)
        assert obstacle(model, structure) is None


def test_structures_reads_kv_heads_and_head_dim_that_a_configuration_leaves_out():
    model = tiny_model("llama", num_key_value_heads=None)
    model.config.head_dim = None
    attention = structures(model)["model.layers.0.self_attn"]
    assert (attention.num_kv_heads, attention.head_dim) == (8, 4)
    assert obstacle(model, attention) is None


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_structures_looks_through_tuner_layers(model_type):
    model = tiny_model(model_type)
    before = structures(model)
    wrap(model, *{name.rpartition(".")[2] for s in before.values() for name in s.projections})
    wrap(model, "experts")
    wrap(model, "o_proj", "c_proj", "dense")  # a tuner layer on a tuner layer
    assert structures(model) == before
    plain = tiny_model(model_type)
    for structure in before.values():
        assert obstacle(model, structure) is None
        for leaf, member in structure.projections.items():
            owner, _, attribute = f"{structure.name}.{member.suffix}".rpartition(".")
            value = parameter(model, structure, member)
            assert torch.equal(value, getattr(plain.get_submodule(owner), attribute)), leaf
            assert getattr(base_layer(model, owner), attribute) is value


def test_structures_of_a_peft_model():
    model = tiny_model("llama")
    before = list(structures(model).values())
    assert all(obstacle(model, structure) is None for structure in before)
    # adapter names become module names: those of a structure must not be mistaken for one
    targets = ["v_proj", "o_proj", "down_proj"]
    peft_model = get_peft_model(model, LoraConfig(target_modules=targets), adapter_name="mlp")
    after = structures(peft_model)
    assert [s.members for s in after.values()] == [s.members for s in before]
    assert list(after) == [f"base_model.model.{s.name}" for s in before]
    # LoRA's factors are in the order of the checkpoint: the weight beside them must keep it
    assert obstacle(peft_model, after["base_model.model.model.layers.0.mlp"]) == (
        "down_proj has an adapter of another method: lora_A.mlp.weight"
    )
    peft_model.unload()
    assert all(obstacle(model, structure) is None for structure in before)


def test_structures_of_a_mixture_with_lora_on_its_experts():
    model = tiny_model("mixtral", torch.float32)
    before = structures(model)
    config = LoraConfig(target_parameters=["experts.gate_up_proj"], target_modules=[], r=2)
    get_peft_model(model, config)
    assert structures(model) == before
    assert obstacle(model, before["model.layers.1.mlp.experts"]) == (
        "it has an adapter of another method: lora_A.default.weight"
    )
    assert obstacle(model, before["model.layers.1.self_attn"]) is None


def test_role():
    found = structures(tiny_model("qwen2"))
    attention, ffn = found["model.layers.1.self_attn"], found["model.layers.1.mlp"]
    roles = {
        leaf: (structure.role(leaf).dim, structure.role(leaf).unit)
        for structure, leaves in ((attention, "qkvo"), (ffn, ("gate", "up", "down")))
        for leaf in (f"{part}_proj" for part in leaves)
    }
    assert roles == {
        "q_proj": ("out", "query_head"),
        "k_proj": ("out", "kv_head"),
        "v_proj": ("out", "kv_head"),
        "o_proj": ("in", "query_head"),
        "gate_proj": ("out", "channel"),
        "up_proj": ("out", "channel"),
        "down_proj": ("in", "channel"),
    }
    assert (attention.unit, ffn.unit) == ("query_head", "channel")
    with pytest.raises(ValueError, match="no projection 'fc1', it has gate_proj, up_proj, down"):
        ffn.role("fc1")
    experts = structures(tiny_model("mixtral"))["model.layers.0.mlp.experts"]
    assert [experts.role(leaf).dim for leaf in ("gate_up_proj", "down_proj")] == ["out", "in"]
    with pytest.raises(ValueError, match="no projection 'up_proj', it has gate_up_proj, down_proj"):
        experts.role("up_proj")


def test_positions_of_experts_count_within_each():
    mixture = structures(tiny_model("qwen3_moe"))["model.layers.1.mlp.experts"]  # 4 of 24 channels
    gate_up, down = mixture.role("gate_up_proj"), mixture.role("down_proj")
    units = torch.tensor([72, 73, 3, 2, 24, 47, 48, 50])
    assert mixture.channels(down, units).tolist() == [[2, 3], [0, 23], [0, 2], [0, 1]]
    both = [[2, 3, 26, 27], [0, 23, 24, 47], [0, 2, 24, 26], [0, 1, 24, 25]]
    assert mixture.channels(gate_up, units).tolist() == both
    for member in (gate_up, down):
        index = mixture.channels(member, units)
        assert index.dtype == torch.int32
        assert mixture.units_at(member, index).tolist() == sorted(units.tolist())
    assert find({mixture.name: mixture}, f"{mixture.name}.down_proj") == (mixture, down)
    with pytest.raises(ValueError, match=r"of each of the 4 experts wanted, got \[2, 2, 2, 1\]"):
        mixture.channels(down, units[1:])


def test_find():
    found = structures(tiny_model("bert"))
    attention, ffn = found["bert.encoder.layer.1.attention"], found["bert.encoder.layer.1"]
    names = {
        "attention.self.value": (attention, "self.value"),
        "attention.output.dense": (attention, "output.dense"),
        "output.dense": (ffn, "output.dense"),
    }
    for name, (structure, leaf) in names.items():
        place = find(found, f"bert.encoder.layer.1.{name}")
        assert place == (structure, structure.role(leaf))
    for name in ("attention.output", "attention.dense", "dense", ""):
        assert find(found, f"bert.encoder.layer.1.{name}") is None
    assert find(found, "cls.predictions.transform.dense") is None


@pytest.mark.parametrize(
    "model_type, name, leaf, units, channels",
    [
        # 8 heads of 4 channels and 4 KV heads; a KV head is trained once
        (
            "phi3",
            "model.layers.0.self_attn",
            "qkv_proj",
            [2, 3],
            [*range(8, 16), *range(36, 40), *range(52, 56)],
        ),
        ("phi3", "model.layers.0.mlp", "gate_up_proj", [3, 39], [3, 39, 43, 79]),
        (
            "gpt2",
            "transformer.h.0.attn",
            "c_attn",
            [5],
            [*range(20, 24), *range(52, 56), *range(84, 88)],
        ),
        (
            "gpt_neox",
            "gpt_neox.layers.0.attention",
            "query_key_value",
            [1, 7],
            [*range(12, 24), *range(84, 96)],
        ),
        ("qwen2", "model.layers.0.self_attn", "v_proj", [0, 1, 7], [*range(4), *range(12, 16)]),
        ("qwen2", "model.layers.0.self_attn", "o_proj", [6], [*range(24, 28)]),
    ],
)
def test_where_units_lie_on_an_axis(model_type, name, leaf, units, channels):
    structure = structures(tiny_model(model_type))[name]
    member = structure.role(leaf)
    got = structure.channels(member, torch.tensor(units, dtype=torch.int32))
    assert (got.tolist(), got.dtype) == (channels, torch.int32)
    back = structure.units_at(member, got)
    assert back.tolist() == ([0, 1, 6, 7] if leaf == "v_proj" else units)


def test_units_of_positions_in_k_and_v_alone():
    attention = structures(tiny_model("phi3"))["model.layers.0.self_attn"]
    index = torch.tensor([47, 52], dtype=torch.int32)  # k of KV head 3, v of KV head 1
    assert attention.units_at(attention.role("qkv_proj"), index).tolist() == [2, 3, 6, 7]


def test_sizes_that_a_configuration_leaves_out():
    ffn = structures(tiny_model("gpt2", intermediate_size=None))["transformer.h.0.mlp"]
    assert ffn.num_channels == 4 * 32


def test_the_axis_follows_the_layer():
    """A Linear in the place of a square Conv1D: only the layer can say which axis is which."""
    model = tiny_model("gpt2")
    attn = model.transformer.h[1].attn
    attn.c_proj = nn.Linear(32, 32).double()
    found = structures(model)
    axes = [found[f"transformer.h.{i}.attn"].role("c_proj").axis for i in (0, 1)]
    assert axes == [0, 1]
    assert obstacle(model, found["transformer.h.1.attn"]) is None


def test_a_module_without_the_projections_is_no_structure():
    model = tiny_model("llama")
    model.model.layers[0].mlp = nn.Sequential(nn.Linear(32, 32))
    assert "model.layers.0.mlp" not in structures(model)
    assert len(structures(model)) == 3


def test_default_targets():
    assert {model_type: in_projections(model_type) for model_type in TABLE} == {
        **dict.fromkeys(
            ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"),
            ["o_proj", "down_proj"],
        ),
        "gpt2": ["c_proj"],
        "gpt_neox": ["dense", "dense_4h_to_h"],
        "opt": ["out_proj", "fc2"],
        "bert": ["output.dense"],
        "roberta": ["output.dense"],
        "mixtral": ["o_proj", "down_proj"],
        "qwen3_moe": ["o_proj", "down_proj"],
    }


def test_structures_refuses_an_unknown_model_type():
    model = tiny_model("llama")
    model.config.model_type = "sunbird"
    with pytest.raises(
        ValueError, match="'sunbird' is not in .* llama, mistral, .* qwen3_moe, roberta; add"
    ):
        structures(model)
    with pytest.raises(ValueError, match="model type None is not in"):
        structures(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "owner, name",
    [
        ("self_attn", "sinks"),  # one per head
        ("self_attn.q_proj", "scale"),
        ("mlp.norm", "weight"),
        ("self_attn.q_norm", "weight"),  # known for qwen3, where it has another size
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_structures_refuses_a_parameter_that_the_table_does_not_name(owner, name, wrapped):
    model = tiny_model("llama")
    layer = model.model.layers[1]
    *path, last = owner.split(".")
    if last.endswith("norm"):
        layer.get_submodule(path[0]).add_module(last, nn.RMSNorm(32))
    else:
        layer.get_submodule(owner).register_parameter(name, nn.Parameter(torch.zeros(8)))
    if wrapped:
        wrap(model, "q_proj", "down_proj")
    with pytest.raises(ValueError, match=f"model.layers.1.{owner}.{name} is not in .*'llama'; add"):
        structures(model)


@pytest.mark.parametrize(
    "model_type, owner, name",
    [
        ("opt", "model.decoder.layers.1", "gate"),  # the decoder layer is the FFN
        ("opt", "model.decoder.layers.1.self_attn", "sinks"),
        ("bert", "bert.encoder.layer.1.intermediate", "norm"),
        ("mixtral", "model.layers.1.mlp.experts", "gate_up_proj_bias"),
    ],
)
def test_structures_refuses_it_in_nested_modules_too(model_type, owner, name):
    model = tiny_model(model_type)
    model.get_submodule(owner).register_parameter(name, nn.Parameter(torch.zeros(8)))
    with pytest.raises(ValueError, match=f"^{owner}.{name} is not in .*'{model_type}'; add"):
        structures(model)


def test_structures_refuses_cross_attention_in_an_encoder_layer():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "bert",
            hidden_size=8,
            num_attention_heads=2,
            intermediate_size=8,
            num_hidden_layers=1,
            vocab_size=8,
            is_decoder=True,
            add_cross_attention=True,
        )
    )
    with pytest.raises(ValueError, match="layer.0.crossattention.self.query.weight is not in"):
        structures(model)


class QuantizedLinear(nn.Linear):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)
        self.weight_scale = nn.Parameter(torch.ones(1))


def _quantized(model):
    layer = model.model.layers[0].mlp
    layer.down_proj = QuantizedLinear(40, 32)


def _packed(model):
    """A quantized layer whose weight has another name."""
    layer = nn.Module()
    layer.register_buffer("qweight", torch.zeros(5, 32, dtype=torch.int32))
    model.model.layers[0].mlp.down_proj = layer


def _int8(model):
    weight = torch.zeros(32, 40, dtype=torch.int8)
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(weight, requires_grad=False)


def _tied(model):
    first, second = model.model.layers
    first.mlp.up_proj.weight = second.mlp.up_proj.weight


def _shared(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def _offloaded(model):
    model.model.layers[0].mlp.gate_proj.to("meta")


def _half_of_the_channels(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight[:20].detach())


@pytest.mark.parametrize(
    "change, reason",
    [
        (_quantized, "down_proj is a QuantizedLinear, not a torch.nn.Linear"),
        (_packed, "down_proj is a Module, not a torch.nn.Linear"),
        (_int8, "down_proj.weight is torch.int8, not floating"),
        (
            _tied,
            "up_proj.weight is shared: model.layers.0.mlp.up_proj.weight, "
            "model.layers.1.mlp.up_proj.weight",
        ),
        (
            _shared,
            "gate_proj.weight is shared: model.layers.0.mlp.gate_proj.weight, "
            "model.layers.1.mlp.gate_proj.weight",
        ),
        (
            _offloaded,
            "gate_proj.weight is on the meta device: its values are not loaded, or offloaded",
        ),
        (
            _half_of_the_channels,
            "up_proj.weight has 20 channels on axis 0, the configuration says 40",
        ),
    ],
)
def test_obstacle(change, reason):
    model = tiny_model("qwen2")
    assert all(obstacle(model, structure) is None for structure in structures(model).values())
    change(model)
    found = structures(model)
    assert len(found) == 4
    assert obstacle(model, found["model.layers.0.mlp"]) == reason
    assert obstacle(model, found["model.layers.0.self_attn"]) is None


def test_obstacle_of_experts():
    model = tiny_model("mixtral")
    name = "model.layers.0.mlp.experts"
    experts, structure = model.get_submodule(name), structures(model)[name]
    experts.down_proj = nn.Parameter(experts.down_proj[:3].detach())
    assert obstacle(model, structure) == (
        "down_proj has 3 experts on axis 0, the configuration says 4"
    )
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.byte(), requires_grad=False)
    assert obstacle(model, structure) == "gate_up_proj is torch.uint8, not floating"


def test_obstacle_of_sharded_weights():
    model = tiny_model("llama")
    attention = structures(model)["model.layers.0.self_attn"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        fully_shard(model.model.layers[0], mesh=mesh)
        assert obstacle(model, attention) == "q_proj.weight is a DTensor, not a plain Parameter"
    finally:
        dist.destroy_process_group()


def test_structures_of_a_copy_are_equal():
    model = tiny_model("qwen3")
    assert structures(copy.deepcopy(model)) == structures(model)


def test_parameter_that_is_missing():
    model = tiny_model("mistral")
    attention = structures(model)["model.layers.0.self_attn"]
    with pytest.raises(AttributeError):
        parameter(model, attention, Member("q_proj.bias", ("query_head",), 0))


def test_channels_of_heads():
    channels = channels_of_heads(torch.tensor([4, 0, 2]), 3)
    assert channels.dtype == torch.int32
    assert channels.tolist() == [12, 13, 14, 0, 1, 2, 6, 7, 8]
    assert channels_of_heads(torch.tensor([], dtype=torch.int32), 3).shape == (0,)
