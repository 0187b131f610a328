"""Which parameters of a model share heads or FFN channels (S2FT section 3.1).

A structure is one attention, one FFN, or the experts of one mixture. Its heads or channels lie
along one axis of several parameters: whoever reorders them reorders all of these. Which ones, says
`s2kernels.architectures.TABLE`. What that does not name is refused, never guessed: an unseen norm
or bias would silently change the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from s2kernels.architectures import TABLE, Entry, Kind, Member, Members, Unit, is_bias, is_weight


@dataclass(frozen=True)
class Structure:
    """One attention, FFN or set of experts, and its parameters that share heads or channels.

    `name` is the module's name in the model that was given to `structures`. The sizes come from
    the configuration; those of the other kinds are 0, and `num_experts` is 1 where there are none.
    As units the channels of experts are counted through: channel c of expert e is unit
    e * num_channels + c. Positions along their tensors, (num_experts, n), count within the expert.
    """

    name: str
    kind: Kind
    members: tuple[Member, ...]
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    num_channels: int = 0
    num_experts: int = 1

    @property
    def unit(self) -> Unit:
        """The unit that selections are made in."""
        return "query_head" if self.kind == "attention" else "channel"

    def count(self, unit: Unit) -> int:
        """How many of `unit` the structure has."""
        return {
            "query_head": self.num_heads,
            "kv_head": self.num_kv_heads,
            "channel": self.num_experts * self.num_channels,
        }[unit]

    def width(self, unit: Unit) -> int:
        """How many consecutive channels of a projection one `unit` takes up."""
        return 1 if unit == "channel" else self.head_dim

    def size(self, member: Member) -> int:
        """How many channels the axis of `member` has."""
        return sum(stop - start for _, start, stop, _ in self._segments(member))

    @property
    def projections(self) -> dict[str, Member]:
        """The weights, by the name of their linear layer within the structure ("o_proj"); those of
        experts by their own.
        """
        weights = [m for m in self.members if not is_bias(m)]
        return {m.suffix.removesuffix(".weight"): m for m in weights}

    def role(self, leaf: str) -> Member:
        """The weight of the projection `leaf` ("o_proj"): its `dim` and `units` are what
        an S2FT layer on that projection trains. Raises ValueError for another leaf.
        """
        if leaf not in self.projections:
            known = ", ".join(self.projections)
            raise ValueError(f"{self.name} has no projection {leaf!r}, it has {known}")
        return self.projections[leaf]

    def channels(self, member: Member, units: Tensor) -> Tensor:
        """Where `units`, query heads or channels (n,), lie along the axis of `member`, int32.

        With a query head goes the KV head that it reads. The positions of experts are
        (num_experts, n): ValueError unless `units` has as many of every expert.
        """
        if self.kind == "experts":
            within = self._of_each_expert(units)
            return torch.cat([start + within for _, start, _, _ in self._segments(member)], dim=1)
        parts = []
        for unit, start, _, width in self._segments(member):
            own = torch.unique(units // self._group) if unit == "kv_head" else units
            parts.append(start + channels_of_heads(own, width))
        return torch.cat(parts)

    def units_at(self, member: Member, index: Tensor) -> Tensor:
        """The query heads or channels, ascending, to which the positions `index` along the axis of
        `member` belong: all that read a KV head, where the positions are in k and v alone.
        """
        if self.kind == "experts":
            first = torch.arange(len(index), device=index.device).unsqueeze(1) * self.num_channels
            return torch.unique(first + index % self.num_channels)
        own, of_kv = [index[:0]], [index[:0]]
        for unit, start, stop, width in self._segments(member):
            here = (index[(index >= start) & (index < stop)] - start) // width
            (of_kv if unit == "kv_head" else own).append(here)
        units = torch.unique(torch.cat(own))
        if len(units):
            return units
        readers = torch.arange(self._group, device=index.device)
        return (torch.unique(torch.cat(of_kv)).unsqueeze(1) * self._group + readers).flatten()

    def _of_each_expert(self, units: Tensor) -> Tensor:
        """Units counted through, as channels within their expert: int32 (num_experts, n)."""
        counts = torch.bincount(units // self.num_channels, minlength=self.num_experts)
        if len(counts) != self.num_experts or counts.min() != counts.max():
            raise ValueError(
                f"{self.name}: as many channels of each of the {self.num_experts} experts wanted, "
                f"got {counts.tolist()}"
            )
        within = units.sort().values % self.num_channels
        return within.view(self.num_experts, -1).to(torch.int32)

    @property
    def _group(self) -> int:
        """Query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads

    def _segments(self, member: Member) -> Iterator[tuple[Unit, int, int, int]]:
        """(unit, first channel, end, channels of one unit) of each segment of the axis."""
        stop = 0
        for unit in member.units:
            width = self.width(unit) * member.blocks
            start, stop = stop, stop + self.count(unit) // self.num_experts * width
            yield unit, start, stop, width


def structures(model: nn.Module) -> dict[str, Structure]:
    """All structures of a transformers model by name, in the order of its modules.

    Tuner layers on the projections (modules with a `base_layer`) are looked through, so the answer
    is the same before and after an adapter was injected.

    Raises ValueError for a model type that `TABLE` lacks, and for a parameter in a structure that
    it does not name.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in TABLE:
        raise ValueError(
            f"model type {model_type!r} is not in the coupling table, which knows "
            f"{', '.join(sorted(TABLE))}; add an entry for it to s2kernels.architectures.TABLE"
        )
    found = {
        name: (module, entry)
        for name, module in _base_modules(model)
        for entry in TABLE[model_type]
        if _matches(name, entry.module) and _has_projections(module, entry)
    }
    return {
        name: Structure(
            name,
            entry.kind,
            _members(name, module, entry.members, [n for n in found if n != name], model_type),
            **_sizes(config, entry),
        )
        for name, (module, entry) in found.items()
    }


def find(found: dict[str, Structure], name: str) -> tuple[Structure, Member] | None:
    """The structure that holds the projection called `name`, and the projection's weight.

    The innermost one, if several do; None if none does.
    """
    parts = name.split(".")
    for cut in reversed(range(len(parts))):
        structure, leaf = found.get(".".join(parts[:cut])), ".".join(parts[cut:])
        if structure is not None and leaf in structure.projections:
            return structure, structure.role(leaf)
    return None


def base_layer(model: nn.Module, name: str) -> nn.Module:
    """The module at `name`, or the one that tuner layers there wrap."""
    return _unwrap(model.get_submodule(name))


def parameter(model: nn.Module, structure: Structure, member: Member) -> nn.Parameter:
    """The base model's parameter behind `member`; tuner layers are looked through.

    Raises AttributeError if it does not exist, or is not a Parameter.
    """
    leaf, _, attribute = member.suffix.rpartition(".")
    return base_layer(model, _join(structure.name, leaf)).get_parameter(attribute)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers: a linear layer whose weight is (in, out)."""
    # by name: the core does without transformers
    kind = type(layer)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_dense(layer: nn.Module) -> bool:
    """Whether it is a torch.nn.Linear or a Conv1D, and not a subclass, which may be anything.

    Nor one whose weight is a quantized tensor of torchao.
    """
    if not (type(layer) is nn.Linear or is_conv1d(layer)):
        return False
    kind = type(layer.weight)
    # The first question is one that torch.compile can answer, and mostly enough.
    return kind is nn.Parameter or not kind.__module__.startswith("torchao.")


def not_plain(weight: Tensor) -> str | None:
    """Why `weight` cannot be read as the floats that it stands for; None if it can."""
    if type(weight) is not nn.Parameter or weight.is_meta:
        return f"the weight is a {type(weight).__name__} on {weight.device}"
    if not weight.is_floating_point():
        return f"the weight is {weight.dtype}"
    return None


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
        outer = model.get_submodule(_join(structure.name, leaf))
        layer = _unwrap(outer)
        if leaf and not is_dense(layer):
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
                return f"{leaf or 'it'} has an adapter of another method: {name}"
        sizes = [(member.axis, structure.size(member), "channels")]
        if structure.kind == "experts":
            sizes.append((0, structure.num_experts, "experts"))
        for axis, size, what in sizes:
            if value.shape[axis] != size:
                return (
                    f"{member.suffix} has {value.shape[axis]} {what} on axis {axis}, "
                    f"the configuration says {size}"
                )
    return None


def channels_of_heads(heads: Tensor, head_dim: int) -> Tensor:
    """The channels of `heads` (n,), head by head: (n * head_dim,), int32."""
    within = torch.arange(head_dim, dtype=torch.int32, device=heads.device)
    return (heads.to(torch.int32).unsqueeze(1) * head_dim + within).flatten()


def _sizes(config: Any, entry: Entry) -> dict[str, int]:
    if entry.kind == "attention":
        num_heads = config.num_attention_heads
        return dict(
            num_heads=num_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        )
    # n_inner of GPT-2 may be None, which means this
    num_channels = getattr(config, entry.channels) or 4 * config.hidden_size
    num_experts = getattr(config, entry.experts) if entry.experts else 1
    return dict(num_channels=num_channels, num_experts=num_experts)


def _members(
    name: str, module: nn.Module, table: Members, others: list[str], model_type: str
) -> tuple[Member, ...]:
    """What of `table` the module has. Structures in it, among `others`, answer for themselves."""
    projections = {suffix.rpartition(".")[0] for suffix, member in table.items() if member}
    inside = tuple(f"{other}." for other in others if other.startswith(f"{name}."))
    layers, present = {}, set()
    for leaf, layer in _base_modules(module):
        if f"{name}.{leaf}.".startswith(inside):
            continue
        layers[leaf] = layer
        # Other Linear classes (quantized ones) bring parameters of their own. They are no reason
        # to refuse the model: `obstacle` refuses to permute them.
        foreign = leaf and leaf in projections and not is_dense(layer)
        for attribute, _ in layer.named_parameters(recurse=False, remove_duplicate=False):
            suffix = _join(leaf, attribute)
            if suffix not in table and not foreign:
                raise ValueError(
                    f"{name}.{suffix} is not in the coupling table of {model_type!r}; add it to "
                    "s2kernels.architectures.TABLE, with the axis along which heads or channels "
                    "lie, or with None if it does not depend on their order"
                )
            present.add(suffix)

    members = [m for m in table.values() if m and (m.suffix in present or is_weight(m))]
    return tuple(
        replace(member, axis=1 - member.axis)
        if is_weight(member) and is_conv1d(layers[member.suffix.removesuffix(".weight")])
        else member
        for member in members
    )


def _matches(name: str, pattern: str) -> bool:
    wanted = pattern.split(".")
    parts = name.split(".")[-len(wanted) :]
    return len(parts) == len(wanted) and all(
        part.isdigit() if want == "*" else part == want
        for part, want in zip(parts, wanted, strict=True)
    )


def _has_projections(module: nn.Module, entry: Entry) -> bool:
    """Modules of one name may differ: an `mlp` is a FFN in some layers, a mixture in others."""
    names = {name for name, _ in _base_modules(module)}
    return all(m is None or m.suffix.rpartition(".")[0] in names for m in entry.members.values())


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name and leaf else name or leaf


def _base_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, but a tuner layer gives way to the layer that it wraps, and a compiled
    module to the one that was compiled, under the name that this had before, and what belongs to
    adapters is left out.
    """
    module = _unwrap(module)
    yield name, module
    for leaf, child in module.named_children():
        yield from _base_modules(child, _join(name, leaf))


def _unwrap(module: nn.Module) -> nn.Module:
    while isinstance(inner := _wrapped(module), nn.Module):
        module = inner
    return module


def _wrapped(module: nn.Module) -> Any:
    """What torch.compile or a tuner has put the module in the place of."""
    return module._modules.get("_orig_mod", getattr(module, "base_layer", None))
