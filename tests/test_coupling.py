import copy

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny_models import MODEL_TYPES, tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from s2kernels.coupling import (
    Member,
    base_layer,
    channels_of_heads,
    obstacle,
    parameter,
    structures,
)

WEIGHTS = {
    "attention": [
        ("q_proj.weight", "query_head", 0),
        ("k_proj.weight", "kv_head", 0),
        ("v_proj.weight", "kv_head", 0),
        ("o_proj.weight", "query_head", 1),
    ],
    "ffn": [
        ("gate_proj.weight", "channel", 0),
        ("up_proj.weight", "channel", 0),
        ("down_proj.weight", "channel", 1),
    ],
}
BIASES = {
    "attention": [
        ("q_proj.bias", "query_head", 0),
        ("k_proj.bias", "kv_head", 0),
        ("v_proj.bias", "kv_head", 0),
    ],
    "ffn": [("gate_proj.bias", "channel", 0), ("up_proj.bias", "channel", 0)],
}
WITH_BIASES = {
    "llama": {"attention", "ffn"},
    "mistral": set(),
    "qwen2": {"attention"},
    "qwen3": {"attention"},
}
HEADS = {"llama": (8, 4, 4), "mistral": (8, 2, 4), "qwen2": (8, 4, 4), "qwen3": (8, 2, 6)}


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
    found = structures(tiny_model(model_type))
    assert list(found) == [
        "model.layers.0.self_attn",
        "model.layers.0.mlp",
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
    ]
    for name, structure in found.items():
        kind = "attention" if name.endswith("self_attn") else "ffn"
        expected = WEIGHTS[kind] + (BIASES[kind] if kind in WITH_BIASES[model_type] else [])
        assert (structure.name, structure.kind) == (name, kind)
        assert {(m.suffix, m.unit, m.axis) for m in structure.members} == set(expected)
        assert len(structure.members) == len(expected)
        sizes = (structure.num_heads, structure.num_kv_heads, structure.head_dim)
        assert sizes == (HEADS[model_type] if kind == "attention" else (0, 0, 0))
        assert structure.num_channels == (40 if kind == "ffn" else 0)


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
    weight = model.model.layers[0].self_attn.o_proj.weight
    wrap(model, "q_proj", "o_proj", "down_proj")
    wrap(model, "o_proj")  # a tuner layer on a tuner layer
    assert structures(model) == before
    attention = before["model.layers.0.self_attn"]
    o_proj = attention.role("o_proj")
    assert parameter(model, attention, o_proj) is weight
    assert base_layer(model, "model.layers.0.self_attn.o_proj").weight is weight
    assert obstacle(model, attention) is None


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


def test_structures_refuses_an_unknown_model_type():
    model = tiny_model("llama")
    model.config.model_type = "sunbird"
    with pytest.raises(
        ValueError, match="'sunbird' is not in .* llama, mistral, qwen2, qwen3; add"
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
        parameter(model, attention, Member("q_proj.bias", "query_head", 0))


def test_channels_of_heads():
    channels = channels_of_heads(torch.tensor([4, 0, 2]), 3)
    assert channels.dtype == torch.int32
    assert channels.tolist() == [12, 13, 14, 0, 1, 2, 6, 7, 8]
    assert channels_of_heads(torch.tensor([], dtype=torch.int32), 3).shape == (0,)
