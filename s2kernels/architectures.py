"""The architectures: per model type, which parameters share heads or FFN channels.

`TABLE` is the only knowledge of architectures that there is, and all of it is data. It names every
parameter of the attention modules, the FFNs and the experts, those that stay as they are included.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["attention", "ffn", "experts"]
Unit = Literal["query_head", "kv_head", "channel"]
Dim = Literal["in", "out"]


@dataclass(frozen=True)
class Member:
    """A parameter of a structure, and how the structure's units lie along one of its axes.

    suffix  its name within the structure: "o_proj.weight"
    units   what lies along the axis, segment after segment: ("query_head", "kv_head", "kv_head")
            where q, k and v are fused, a single one elsewhere
    axis    of the tensor as it is stored; in `TABLE` as torch.nn.Linear stores it
    dim     the channels of the projection that they are: "out" = rows of its weight (N, K)
    blocks  runs of head_dim that a head has there: 3 where q, k and v are fused head by head
    """

    suffix: str
    units: tuple[Unit, ...]
    axis: int
    dim: Dim = "out"
    blocks: int = 1

    @property
    def unit(self) -> Unit:
        """What lies along the axis, or along its first segment."""
        return self.units[0]


# Parameter -> how units lie along it, or None where their order does not matter to it. Biases are
# listed for every model type: a model need not have them.
Members = dict[str, Member | None]


def _outputs(name: str, *units: Unit, blocks: int = 1) -> Members:
    """A linear layer whose output channels are `units`, one segment of them after the other."""
    suffixes = (f"{name}.weight", f"{name}.bias")
    return {suffix: Member(suffix, units, 0, "out", blocks) for suffix in suffixes}


def _inputs(name: str, unit: Unit) -> Members:
    """A linear layer whose input channels are `unit`."""
    suffix = f"{name}.weight"
    return {suffix: Member(suffix, (unit,), 1, "in"), f"{name}.bias": None}


def _fixed(*names: str) -> Members:
    """Layers on which the order of heads or channels has no bearing."""
    return {f"{name}.{attribute}": None for name in names for attribute in ("weight", "bias")}


def _attention(q: str, k: str, v: str, o: str) -> Members:
    return (
        _outputs(q, "query_head")
        | _outputs(k, "kv_head")
        | _outputs(v, "kv_head")
        | _inputs(o, "query_head")
    )


@dataclass(frozen=True)
class Entry:
    """Where the models of one type keep one kind of structure.

    module    the last parts of the module's name, "*" for a number: "self_attn", "layers.*"
    members   every parameter in it, except those of structures inside it
    channels  the configuration's name for the number of FFN channels (of an expert)
    experts   the configuration's name for the number of experts
    """

    kind: Kind
    module: str
    members: Members
    channels: str = "intermediate_size"
    experts: str = ""


_QKVO = _attention("q_proj", "k_proj", "v_proj", "o_proj")
_QK_NORM: Members = {"q_norm.weight": None, "k_norm.weight": None}  # (head_dim,), for all heads
_GATED = (
    _outputs("gate_proj", "channel")
    | _outputs("up_proj", "channel")
    | _inputs("down_proj", "channel")
)
_ATTENTION = Entry("attention", "self_attn", _QKVO)
_NORMED_ATTENTION = Entry("attention", "self_attn", _QKVO | _QK_NORM)
_FFN = Entry("ffn", "mlp", _GATED)
_EXPERTS: Members = {  # (experts, out, in)
    "gate_up_proj": Member("gate_up_proj", ("channel", "channel"), 1, "out"),
    "down_proj": Member("down_proj", ("channel",), 2, "in"),
}
_BERT = (
    Entry(
        "attention",
        "attention",
        _attention("self.query", "self.key", "self.value", "output.dense")
        | _fixed("output.LayerNorm"),
    ),
    Entry(
        "ffn",
        "layer.*",
        _outputs("intermediate.dense", "channel")
        | _inputs("output.dense", "channel")
        | _fixed("output.LayerNorm"),
    ),
)

# config.model_type -> its structures
TABLE: dict[str, tuple[Entry, ...]] = {
    "llama": (_ATTENTION, _FFN),
    "mistral": (_ATTENTION, _FFN),
    "qwen2": (_ATTENTION, _FFN),
    "qwen3": (_NORMED_ATTENTION, _FFN),
    "gemma2": (_ATTENTION, _FFN),
    "gemma3_text": (_NORMED_ATTENTION, _FFN),
    "phi3": (
        Entry(
            "attention",
            "self_attn",
            _outputs("qkv_proj", "query_head", "kv_head", "kv_head")
            | _inputs("o_proj", "query_head"),
        ),
        Entry(
            "ffn",
            "mlp",
            _outputs("gate_up_proj", "channel", "channel") | _inputs("down_proj", "channel"),
        ),
    ),
    "gpt2": (
        Entry(
            "attention",
            "attn",
            _outputs("c_attn", "query_head", "kv_head", "kv_head")
            | _inputs("c_proj", "query_head"),
        ),
        Entry("ffn", "mlp", _outputs("c_fc", "channel") | _inputs("c_proj", "channel"), "n_inner"),
    ),
    "gpt_neox": (
        Entry(
            "attention",
            "attention",
            _outputs("query_key_value", "query_head", blocks=3) | _inputs("dense", "query_head"),
        ),
        Entry(
            "ffn",
            "mlp",
            _outputs("dense_h_to_4h", "channel") | _inputs("dense_4h_to_h", "channel"),
        ),
    ),
    "opt": (
        Entry("attention", "self_attn", _attention("q_proj", "k_proj", "v_proj", "out_proj")),
        Entry(
            "ffn",
            "layers.*",
            _outputs("fc1", "channel")
            | _inputs("fc2", "channel")
            | _fixed("self_attn_layer_norm", "final_layer_norm"),
            "ffn_dim",
        ),
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "mixtral": (
        _ATTENTION,
        Entry("experts", "mlp.experts", _EXPERTS, experts="num_local_experts"),
    ),
    "qwen3_moe": (
        _NORMED_ATTENTION,
        _FFN,  # some layers may be dense
        Entry("experts", "mlp.experts", _EXPERTS, "moe_intermediate_size", "num_experts"),
    ),
}


def is_weight(member: Member) -> bool:
    """Whether it is the weight of a linear layer; those of experts are bare parameters."""
    return member.suffix.endswith(".weight")


def is_bias(member: Member) -> bool:
    """Whether it is the bias of a linear layer."""
    return member.suffix.endswith(".bias")


def in_projections(model_type: str) -> list[str]:
    """Names of the projections of a model type whose input channels are heads or channels, tensors
    of experts included: a dense FFN's and the experts' may share one.
    """
    members = [member for entry in TABLE[model_type] for member in entry.members.values()]
    names = [m.suffix.removesuffix(".weight") for m in members if m and m.dim == "in"]
    return list(dict.fromkeys(names))
