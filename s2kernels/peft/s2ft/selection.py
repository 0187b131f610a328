"""Which channels every target trains: from a configuration to positions."""

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from s2kernels.coupling import Structure, structures
from s2kernels.peft.host.kept_buffers import with_values
from s2kernels.peft.host.sharding import num_shards
from s2kernels.peft.s2ft.config import BLOCK, S2FTConfig
from s2kernels.peft.s2ft.layer import S2FTLayer
from s2kernels.select import (
    budget,
    check_scope,
    random_scores,
    random_units,
    ranked_units,
    scores,
)


def select_indices(
    model: nn.Module,
    config: S2FTConfig,
    batches: Iterable[Any] | None = None,
    *,
    progress: bool = True,
) -> S2FTConfig:
    """A copy of `config` with `indices` filled: the channels that its selection takes in `model`.

    batches  calibration data, for selection="activation", "product" or "gradient": any iterable of
             model inputs, about 1 % of the fine-tuning data in the paper (S2FT section 3.2)

    The model is left as it was. What comes back, and an adapter trained from it, needs no
    calibration data any more. See `s2kernels.select.scores` for what the scores are.

    Raises ValueError for a model type that the coupling table lacks, a budget that the model does
    not admit or that names no target, batches that are missing, and scores of a model that is split
    by tensor parallelism.
    """
    targets = {
        f"{structure.name}.{leaf}": (structure, leaf)
        for structure in structures(model).values()
        for leaf in structure.projections
        if is_target(config, structure, leaf)
    }
    if not targets:
        raise ValueError(f"target_modules={config.target_modules!r} names no projection")
    num_experts = {structure.name: structure.num_experts for structure, _ in targets.values()}
    check_scope(config.scope, num_experts)
    counts = {target: _target_budget(config, *place) for target, place in targets.items()}
    check_budget_pattern(config, targets)
    chosen, shards = copy.copy(config), num_shards(model)
    chosen.indices = {}
    if (config.selection, config.scope) == ("random", "layer"):
        for target, (structure, leaf) in targets.items():
            chosen.indices[target] = _drawn_index(config, structure, leaf, shards).tolist()
        return chosen
    if shards > 1:
        raise ValueError(
            "tensor parallelism splits the model: selection must be 'random' in scope 'layer' "
            f"there, got {config.selection!r} in {config.scope!r}; or give indices"
        )
    if config.selection == "random":
        sizes = {_source(config, s, leaf): s.count(s.unit) for s, leaf in targets.values()}
        values = random_scores(config.seed, sizes)
    else:  # which may take long: all else was looked at before
        values = scores(model, config.selection, batches, progress=progress)
    # attention and FFN may each have a projection of one name
    owners: dict[tuple[str, str], list[Structure]] = {}
    for structure, leaf in targets.values():
        owners.setdefault((structure.kind, leaf), []).append(structure)
    for (_, leaf), owning in owners.items():
        ranked = ranked_units(
            {structure.name: values[_source(config, structure, leaf)] for structure in owning},
            {structure.name: counts[f"{structure.name}.{leaf}"] for structure in owning},
            largest=config.largest,
            scope=config.scope,
            block=_block_of(config, owning[0]),
            num_experts=num_experts,
        )
        for structure in owning:
            if structure.name in ranked:
                positions = structure.channels(structure.role(leaf), ranked[structure.name])
                chosen.indices[f"{structure.name}.{leaf}"] = positions.tolist()
    return chosen


def indices_of(
    model: nn.Module, config: S2FTConfig, units: Mapping[str, Tensor]
) -> dict[str, list]:
    """`S2FTConfig.indices` for selected units: those of every structure that `units` names.

    units  by structure, query heads or FFN channels, int32 (n,), as `ranked_units` gives them

    Raises ValueError for a name that is no structure of the model, and for units it does not have.
    """
    found = structures(model)
    if unknown := sorted(units.keys() - found.keys()):
        raise ValueError(f"units: structures of the model wanted, got {', '.join(unknown)}")
    indices = {}
    for name, chosen in units.items():
        if not len(chosen):
            continue
        structure = found[name]
        total = structure.count(structure.unit)
        if not 0 <= int(chosen.min()) <= int(chosen.max()) < total:
            raise ValueError(f"units of {name} must lie in [0, {total}), got {chosen.tolist()}")
        for leaf in structure.projections:
            if is_target(config, structure, leaf):
                positions = structure.channels(structure.role(leaf), chosen)
                indices[f"{name}.{leaf}"] = positions.tolist()
    return indices


def target_index(config: S2FTConfig, layer: S2FTLayer, shards: int = 1) -> Tensor:
    """The channels that an adapter trains of its target `layer`: int32 (R,), of experts
    (num_experts, R). They are those that `config.indices` names, or else drawn at random: outside
    of the coupling table as many input channels as `channels` says.

    shards: see `_drawn_index`. Raises ValueError for what indices cannot be, and for budgets that
    cannot be had.
    """
    key, structure, total = layer.name, layer.structure, layer.num_channels
    with with_values():
        if config.indices is not None:
            return _given_index(key, config.indices[key])
        if structure is not None:
            return _drawn_index(config, structure, key.removeprefix(f"{structure.name}."), shards)
        block = config.granularity
        count = _budget(config, "channels", key, total, block)
        return random_units(config.seed, key, total, count, block)


def _given_index(key: str, index: Any) -> Tensor:
    try:
        given = torch.tensor(index, device="cpu")
        if given.numel() and (given.is_floating_point() or given.dtype == torch.bool):
            raise TypeError(f"got {given.dtype}")
        return torch.tensor(index, dtype=torch.int32, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:  # the last one of too large numbers
        raise ValueError(
            f"indices[{key!r}] must be a list of whole numbers, of experts as many for each: "
            f"{error}"
        ) from None


def _drawn_index(config: S2FTConfig, structure: Structure, leaf: str, shards: int) -> Tensor:
    """The channels of the target `leaf` of a structure, drawn at random.

    They are a function of (seed, `_source`), those of an expert of its number, too.

    shards: into how many equal parts tensor parallelism splits the units. Each trains those at
    the same places, so that each has equally many, of the KV heads they read, too. Raises
    ValueError for units that cannot be split so.
    """
    sources = [_source(config, structure, leaf)]
    if structure.kind == "experts":
        sources = [f"{sources[0]}.{expert}" for expert in range(structure.num_experts)]
    total, block = _units_of_part(structure), _block_of(config, structure)
    if shards > 1 and total % (shards * block):
        raise ValueError(
            f"{structure.name}.{leaf}: tensor parallelism splits {total} {structure.unit}s over "
            f"{shards} processes, which needs a multiple of {shards * block}"
        )
    total //= shards
    count = _target_budget(config, structure, leaf, shards) // shards
    parts = [
        (part * shards + shard) * total + random_units(config.seed, source, total, count, block)
        for part, source in enumerate(sources)
        for shard in range(shards)
    ]
    return structure.channels(structure.role(leaf), torch.cat(parts))


def _source(config: S2FTConfig, structure: Structure, leaf: str) -> str:
    """By whose name a target draws or is scored: its structure's, with coupled=False its own."""
    apart = config.selection == "random" and not config.coupled
    return f"{structure.name}.{leaf}" if apart else structure.name


def _target_budget(config: S2FTConfig, structure: Structure, leaf: str, shards: int = 1) -> int:
    """How many units of a structure, or of each expert, its target `leaf` trains."""
    name = "heads" if structure.kind == "attention" else "channels"
    block = _block_of(config, structure) * shards
    return _budget(config, name, f"{structure.name}.{leaf}", _units_of_part(structure), block)


def _budget(config: S2FTConfig, name: str, key: str, total: int, block: int) -> int:
    """How many of `total` units the target `key` trains, by budget_pattern or the field `name`; see
    `s2kernels.select.budget`.
    """
    value = getattr(config, name)
    pattern = get_pattern_key(list(config.budget_pattern), key)
    if pattern in config.budget_pattern:
        name, value = f"budget_pattern[{pattern!r}]", config.budget_pattern[pattern]
    return budget(value, total, name, block)


def check_budget_pattern(config: S2FTConfig, targets: Collection[str]) -> None:
    """Raises ValueError for keys of budget_pattern that are those of no target."""
    if lost := [
        key
        for key in config.budget_pattern
        if all(get_pattern_key([key], target) != key for target in targets)
    ]:
        raise ValueError(
            f"budget_pattern must name targets of the adapter, got {', '.join(sorted(lost))}"
        )


def _units_of_part(structure: Structure) -> int:
    """How many units there are to choose from: those of the structure, or of one expert."""
    return structure.count(structure.unit) // structure.num_experts


def _block_of(config: S2FTConfig, structure: Structure) -> int:
    """Units that are selected together: runs of channels, single heads."""
    if structure.unit != "channel":
        return 1
    return BLOCK if config.layout == "block" else config.granularity


def is_target(config: S2FTConfig, structure: Structure, leaf: str) -> bool:
    """Whether the adapter trains the projection, or tensor of experts, `leaf` of a structure."""
    if config.target_modules is None or config.target_modules == "all-linear":
        is_default = structure.role(leaf).dim == "in"
        if not (is_default if config.target_modules is None else structure.kind != "experts"):
            return False
        config = copy.copy(config)  # its other fields may still exclude it
        config.target_modules = {leaf}
    return bool(check_target_module_exists(config, f"{structure.name}.{leaf}"))
