"""Which parameters of a model share heads or FFN channels, per model type (S2FT section 3.1).

A structure is one attention or one FFN module. Its heads or channels lie along one axis of several
parameters: whoever reorders them reorders all of these. The only knowledge of architectures is
`TABLE`, which names every parameter of the two modules, those that stay as they are included. What
it does not name is refused, never guessed: an unseen norm or bias would silently change the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["attention", "ffn"]
Unit = Literal["query_head", "kv_head", "channel"]
Dim = Literal["in", "out"]

# Parameter -> (what lies along it, axis), or None where it does not depend on the order of heads
# or channels. Biases are listed for every model type: a model need not have them.
Places = dict[str, tuple[Unit, int] | None]

_ATTENTION: Places = {
    "q_proj.weight": ("query_head", 0),
    "q_proj.bias": ("query_head", 0),
    "k_proj.weight": ("kv_head", 0),
    "k_proj.bias": ("kv_head", 0),
    "v_proj.weight": ("kv_head", 0),
    "v_proj.bias": ("kv_head", 0),
    "o_proj.weight": ("query_head", 1),
    "o_proj.bias": None,
}
_QK_NORM: Places = {  # (head_dim,): one vector, shared by all heads
    "q_norm.weight": None,
    "k_norm.weight": None,
}
_FFN: Places = {
    "gate_proj.weight": ("channel", 0),
    "gate_proj.bias": ("channel", 0),
    "up_proj.weight": ("channel", 0),
    "up_proj.bias": ("channel", 0),
    "down_proj.weight": ("channel", 1),
    "down_proj.bias": None,
}

# config.model_type -> kind -> (last part of the module's name, its parameters).
TABLE: dict[str, dict[Kind, tuple[str, Places]]] = {
    "llama": {"attention": ("self_attn", _ATTENTION), "ffn": ("mlp", _FFN)},
    "mistral": {"attention": ("self_attn", _ATTENTION), "ffn": ("mlp", _FFN)},
    "qwen2": {"attention": ("self_attn", _ATTENTION), "ffn": ("mlp", _FFN)},
    "qwen3": {"attention": ("self_attn", _ATTENTION | _QK_NORM), "ffn": ("mlp", _FFN)},
}


@dataclass(frozen=True)
class Member:
    """A parameter of a structure and the axis along which the structure's units lie."""

    suffix: str  # "o_proj.weight": its name within the structure
    unit: Unit
    axis: int

    @property
    def dim(self) -> Dim:
        """The channels of the projection that the units are: "out" = rows of its weight."""
        return "in" if self.axis == 1 else "out"


@dataclass(frozen=True)
class Structure:
    """One attention or FFN module, and its parameters that share heads or channels.

    `name` is the module's name in the model that was given to `structures`. The sizes come from
    the configuration; those of the other kind are 0.
    """

    name: str
    kind: Kind
    members: tuple[Member, ...]
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    num_channels: int = 0

    @property
    def unit(self) -> Unit:
        """The unit that selections are made in."""
        return "query_head" if self.kind == "attention" else "channel"

    def count(self, unit: Unit) -> int:
        """How many of `unit` the structure has."""
        return {
            "query_head": self.num_heads,
            "kv_head": self.num_kv_heads,
            "channel": self.num_channels,
        }[unit]

    def width(self, unit: Unit) -> int:
        """How many consecutive channels of a projection one `unit` takes up."""
        return 1 if unit == "channel" else self.head_dim

    def role(self, leaf: str) -> Member:
        """The weight of the projection `leaf` ("o_proj"): its `dim` and `unit` are what
        an S2FT layer on that projection trains. Raises ValueError for another leaf.
        """
        weights = [member for member in self.members if member.suffix.endswith(".weight")]
        for member in weights:
            if member.suffix == f"{leaf}.weight":
                return member
        known = ", ".join(member.suffix.removesuffix(".weight") for member in weights)
        raise ValueError(f"{self.name} has no projection {leaf!r}, it has {known}")


def structures(model: nn.Module) -> dict[str, Structure]:
    """All structures of a transformers model by name, in the order of its modules.

    Tuner layers on the projections (modules with a `base_layer`) are looked through, so the answer
    is the same before and after an adapter was injected.

    Raises ValueError for a model type that `TABLE` lacks, and for a parameter in an attention or
    FFN module that it does not name.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in TABLE:
        raise ValueError(
            f"model type {model_type!r} is not in the coupling table, which knows "
            f"{', '.join(sorted(TABLE))}; add an entry for it to s2kernels.coupling.TABLE"
        )
    num_heads = config.num_attention_heads
    heads = dict(
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
    )
    sizes = {"attention": heads, "ffn": dict(num_channels=config.intermediate_size)}

    found = {}
    for name, module in _base_modules(model):
        for kind, (leaf, table) in TABLE[model_type].items():
            if name.rpartition(".")[2] == leaf:
                members = _members(name, module, table, model_type)
                found[name] = Structure(name, kind, members, **sizes[kind])
    return found


def base_layer(model: nn.Module, name: str) -> nn.Module:
    """The module at `name`, or the one that tuner layers there wrap."""
    return _unwrap(model.get_submodule(name))


def parameter(model: nn.Module, structure: Structure, member: Member) -> nn.Parameter:
    """The base model's parameter behind `member`; tuner layers are looked through.

    Raises AttributeError if it does not exist, or is not a Parameter.
    """
    leaf, _, attribute = member.suffix.rpartition(".")
    return base_layer(model, f"{structure.name}.{leaf}").get_parameter(attribute)


def obstacle(model: nn.Module, structure: Structure) -> str | None:
    """Why the heads or channels of `structure` cannot be permuted in place; None if they can.

    Quantized, sharded, offloaded and tied weights cannot, nor those beside which an adapter of
    another method lies: it is in the order of the checkpoint. The gather layout needs none of this.
    """
    names: dict[int, list[str]] = {}
    for name, shared in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(shared), []).append(name)

    for member in structure.members:
        leaf, _, attribute = member.suffix.rpartition(".")
        outer = model.get_submodule(f"{structure.name}.{leaf}")
        layer = _unwrap(outer)
        if type(layer) is not nn.Linear:
            return f"{leaf} is a {type(layer).__name__}, not a torch.nn.Linear"
        value = getattr(layer, attribute)
        if type(value) is not nn.Parameter:  # DTensor and the quantized types are subclasses
            return f"{member.suffix} is a {type(value).__name__}, not a plain Parameter"
        if not value.is_floating_point():
            return f"{member.suffix} is {value.dtype}, not floating"
        if value.is_meta:
            return f"{member.suffix} is on the meta device: its values are not loaded, or offloaded"
        if len(names[id(value)]) > 1:
            return f"{member.suffix} is shared: {', '.join(names[id(value)])}"
        base = {id(own) for own in layer.parameters()}
        for name, other in outer.named_parameters():
            if id(other) not in base and "s2ft_" not in name:  # ours is translated by its tuner
                return f"{leaf} has an adapter of another method: {name}"
        size = structure.count(member.unit) * structure.width(member.unit)
        if value.shape[member.axis] != size:
            return (
                f"{member.suffix} has {value.shape[member.axis]} channels on axis {member.axis}, "
                f"the configuration says {size}"
            )
    return None


def channels_of_heads(heads: Tensor, head_dim: int) -> Tensor:
    """The channels of `heads` (n,), head by head: (n * head_dim,), int32."""
    within = torch.arange(head_dim, dtype=torch.int32, device=heads.device)
    return (heads.to(torch.int32).unsqueeze(1) * head_dim + within).flatten()


def _members(name: str, module: nn.Module, table: Places, model_type: str) -> tuple[Member, ...]:
    projections = {suffix.rpartition(".")[0] for suffix, place in table.items() if place}
    present = set()
    for leaf, layer in _base_modules(module):
        # Other Linear classes (quantized ones) bring parameters of their own. They are no reason
        # to refuse the model: `obstacle` refuses to permute them.
        foreign = leaf in projections and type(layer) is not nn.Linear
        for attribute, _ in layer.named_parameters(recurse=False, remove_duplicate=False):
            suffix = f"{leaf}.{attribute}".lstrip(".")
            if suffix not in table and not foreign:
                raise ValueError(
                    f"{name}.{suffix} is not in the coupling table of {model_type!r}; add it to "
                    "s2kernels.coupling.TABLE, with the axis along which heads or channels lie, "
                    "or with None if it does not depend on their order"
                )
            present.add(suffix)
    return tuple(
        Member(suffix, *place)
        for suffix, place in table.items()
        if place and (suffix in present or suffix.endswith(".weight"))
    )


def _base_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, but a tuner layer gives way to the layer that it wraps, under the name
    that this had before, and what belongs to adapters is left out.
    """
    module = _unwrap(module)
    yield name, module
    for leaf, child in module.named_children():
        yield from _base_modules(child, f"{name}.{leaf}" if name else leaf)


def _unwrap(module: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module
