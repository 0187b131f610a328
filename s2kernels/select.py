"""Which heads and channels are trained, and how many (S2FT section 3.2)."""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from s2kernels.architectures import is_bias
from s2kernels.autograd.checks import check_choice
from s2kernels.calibrate import (
    Batch,
    activation_squares,
    channel_squares,
    gradient_squares,
    per_unit,
)
from s2kernels.coupling import Structure, channels_of_heads, parameter, structures

STRATEGIES = ("weight", "activation", "product", "gradient")
SCOPES = ("layer", "global")


def budget(value: int | float, total: int, name: str, block: int = 1) -> int:
    """How many of `total` units are trained.

    value  an int is a count, 1 to total; a float is a share, above 0 and at most 1, of which the
           nearest count is taken, at least 1. So 1 is one unit and 1.0 is all of them.
    name   what is counted, for the messages: "heads"
    block  the answer is rounded up to a multiple of it, as far as `total` holds whole blocks

    Raises TypeError for another type, bool included; ValueError for a value outside the range, and
    for a total smaller than one block.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}: a count (int) or a share (float) wanted, got {type(value).__name__} {value!r}"
        )
    if block < 1 or total < block:
        raise ValueError(f"{name}: blocks of {block} wanted, there are {total} in all")
    if isinstance(value, int):
        if not 1 <= value <= total:
            raise ValueError(f"{name}: {value} wanted of {total}, a count must be 1 to {total}")
        count = value
    else:
        if not 0 < value <= 1:
            raise ValueError(f"{name}: {value} wanted, a share must be above 0 and at most 1")
        count = max(1, math.floor(value * total + 0.5))
    return min(math.ceil(count / block), total // block) * block


def random_units(seed: int, name: str, total: int, count: int, block: int = 1) -> Tensor:
    """S2FT-R: `count` of `total` heads or channels at random, int32 (count,), ascending.

    With block > 1 the units come in runs of `block` consecutive ones that begin at a multiple of
    `block`; a shorter run at the end of `total` is never drawn.

    The answer follows from the arguments alone: neither the order in which modules are visited nor
    the global random state, the default device or the machine matters. Layers of one model draw
    independently because `name` is theirs. A release of torch may change its generator, which is
    why adapters store their indices and not their seed.

    Raises ValueError if count is no multiple of block or exceeds the units in whole blocks.
    """
    num_blocks = _check_count(name, total, count, block)
    order = torch.randperm(num_blocks, generator=seeded_generator(seed, name), device="cpu")
    blocks = order[: count // block]
    return channels_of_heads(blocks.sort().values, block)


def random_scores(seed: int, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """S2FT-R as scores, for `ranked_units`: uniform on [0, 1), fp64 (size,) for each name.

    Those of a name follow from it, the seed and the size alone; see `random_units`.
    """
    generators = {name: seeded_generator(seed, name) for name in sizes}
    return {
        name: torch.rand(size, dtype=torch.float64, generator=generators[name], device="cpu")
        for name, size in sizes.items()
    }


def scores(
    model: nn.Module,
    strategy: str,
    batches: Iterable[Batch] | None = None,
    *,
    progress: bool = True,
) -> dict[str, Tensor]:
    """S2FT-W, -A, -S and -G: one score for each query head or FFN channel of every structure.

    model     a transformers model that the coupling table knows, before or after a tuner
    strategy  with W the coupled weights, x (tokens, K) the coupled activation, that is the input
              of o_proj or down_proj, and [u] the part that belongs to unit u:

                  "weight"      w[u] = sqrt(sum over W of || W[u] ||_F^2)
                  "activation"  a[u] = sqrt(mean over tokens t of || x[t, u] ||^2)
                  "product"     w[u] * a[u]
                  "gradient"    g[u] = sqrt(mean over sequences s of
                                            sum over W of || (d loss_s / d W)[u] ||_F^2)

    batches   for all strategies but "weight": any iterable of model inputs, that is of mappings
              (dict, BatchEncoding) with input_ids or inputs_embeds, or of input_ids tensors
              (batch, length). It is gone through once, and moved to the model's device.
    progress  show a bar while it is, if tqdm is installed

    Answers with fp64 tensors (units,) on the CPU by the names of `s2kernels.coupling.structures`,
    in the original basis. To an expert, x[t] is zero for the tokens that do not go to it.

    What belongs to a query head are its rows of q, its columns of o, and the rows of k and v of the
    KV head that it reads, which so count for several heads; to an FFN channel its rows of gate and
    up and its column of down. Biases do not count. Padding, where attention_mask is 0, does not
    count as tokens. loss_s is the model's loss on sequence s alone, in language models the mean
    over its tokens; labels that are missing are made from input_ids for causal models. fp16
    gradients underflow: load such a model in bf16 or fp32.

    So the answer does not depend on how the calibration set is split into batches or, where
    torch.distributed is initialised, over processes: each brings its own share and all get the
    scores of the whole. A sharded model runs on all processes at once: there, all must bring the
    same number of batches, and for "gradient" of sequences.

    The weights are the base model's; activations and gradients are those of the model as it is,
    active adapters included, in eval mode. Model, gradients, training modes and random states are
    left as they were, also by an exception.

    Raises ValueError for an unknown strategy, for batches that are missing, empty, or lack what the
    strategy needs, and for a structure that the model does not run as modules; TypeError for
    batches of another type.
    """
    check_choice("strategy", strategy, STRATEGIES)
    if strategy == "weight":
        return _roots(weight_squares(model))
    if batches is None:
        raise ValueError(f"batches: strategy {strategy!r} wants model inputs, got None")
    if strategy == "gradient":
        return _roots(gradient_squares(model, batches, progress=progress))
    if strategy == "activation":
        return _roots(activation_squares(model, batches, progress=progress))
    weights = weight_squares(model)
    activations = activation_squares(model, batches, progress=progress)
    return _roots({name: weights[name] * squares for name, squares in activations.items()})


def weight_squares(model: nn.Module) -> dict[str, Tensor]:
    """The square of the score "weight" of every structure: see `scores`."""
    model.state_dict()  # makes S2FT layers give the base weights back, in the original basis
    return {name: _weight_squares(model, found) for name, found in structures(model).items()}


def ranked_units(
    scores: Mapping[str, Tensor],
    counts: Mapping[str, int],
    *,
    largest: bool = True,
    scope: str = "layer",
    block: int = 1,
    num_experts: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The units with the largest or smallest scores of every structure in `counts`.

    scores  by structure, floating (units,), as `scores` gives them
    counts  by structure, how many units to take: see `budget`
    scope   "layer" takes its count from each structure. "global" lets structures of one kind, those
            whose names differ in numbers only, compete for the sum of their counts: heads with
            heads, channels with channels. One that gets none is missing from the answer.
    block   units come in runs of `block` that begin at a multiple of it, and a run's score is the
            root of its sum of squares. A shorter run at the end is never taken.
    num_experts  by structure, into how many equal parts its units fall (`Structure.num_experts`):
            the count is taken from each of them. Absent: one part.

    Answers with int32 tensors, ascending, on the CPU. Of equal scores the one at the lower
    position, and in the earlier structure of `scores`, is taken first.

    Raises ValueError for an unknown scope, a structure without scores, scores that are not finite,
    a count that is no multiple of block or exceeds the units in whole blocks, and for experts in
    scope "global": some would get more channels than others, and one tensor holds the slices of
    all.
    """
    check_scope(scope, {name: (num_experts or {}).get(name, 1) for name in counts})
    if unknown := sorted(counts.keys() - scores.keys()):
        raise ValueError(f"counts: structures with scores wanted, got {', '.join(unknown)}")
    groups: dict[Any, list[tuple[str, int]]] = {}
    parts: dict[tuple[str, int], Tensor] = {}
    for name in scores:
        num = (num_experts or {}).get(name, 1)
        for expert, part in enumerate(scores[name].view(num, -1) if name in counts else ()):
            key = name, expert
            parts[key] = _run_scores(name, part, counts[name], block)
            kind = key if scope == "layer" else re.sub(r"\d+", "#", name)
            groups.setdefault(kind, []).append(key)

    chosen: dict[str, list[Tensor]] = {}
    for keys in groups.values():
        values = torch.cat([parts[key] for key in keys])
        order = values.sort(descending=largest, stable=True).indices
        taken = torch.zeros(len(order), dtype=torch.bool, device="cpu")
        taken[order[: sum(counts[name] for name, _ in keys) // block]] = True
        masks = taken.split([len(parts[key]) for key in keys])
        for (name, expert), mask in zip(keys, masks, strict=True):
            if mask.any():
                units = channels_of_heads(mask.nonzero().flatten(), block)
                first = expert * (len(scores[name]) // (num_experts or {}).get(name, 1))
                chosen.setdefault(name, []).append(units + first)
    return {name: torch.cat(chosen[name]) for name in scores if name in chosen}


def check_scope(scope: str, num_experts: Mapping[str, int]) -> None:
    """Raises ValueError for an unknown scope, and for experts in scope "global"; see
    `ranked_units`. To be called before scores are computed, which may take long.
    """
    check_choice("scope", scope, SCOPES)
    for name, num in num_experts.items():
        if num > 1 and scope == "global":
            raise ValueError(
                f"scope='global' cannot be had for {name}: each of its {num} experts trains as "
                "many channels; use scope='layer'"
            )


def _run_scores(name: str, scores: Tensor, count: int, block: int) -> Tensor:
    """The score of every whole block of a structure, on the CPU."""
    _check_count(name, len(scores), count, block)
    if not torch.isfinite(scores).all():
        raise ValueError(f"scores of {name}: finite numbers wanted")
    scores = scores.detach().to("cpu", torch.float64)
    if block == 1:
        return scores
    return scores[: len(scores) // block * block].view(-1, block).square().sum(1).sqrt()


def _weight_squares(model: nn.Module, structure: Structure) -> Tensor:
    total = torch.zeros(structure.count(structure.unit), dtype=torch.float64, device="cpu")
    for member in structure.members:
        if is_bias(member):
            continue
        value = parameter(model, structure, member).detach()
        if not value.is_floating_point() or value.is_meta:
            raise ValueError(
                f"strategy 'weight' needs floating weights, {structure.name}.{member.suffix} is "
                f"{value.dtype} on {value.device}"
            )
        squares = channel_squares(structure, member, value)
        if isinstance(squares, DTensor):
            squares = squares.full_tensor()
        total += per_unit(structure, member, squares.cpu())
    return total


def _roots(squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.sqrt() for name, value in squares.items()}


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU whose draws depend on `seed` and `name` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))


def _check_count(name: str, total: int, count: int, block: int) -> int:
    """How many whole blocks there are, if `count` units can be taken from them."""
    num_blocks = total // block if block > 0 else 0
    if not 0 < count <= num_blocks * block or count % block:
        raise ValueError(
            f"{name}: {count} units wanted of {total} in blocks of {block}, a count must be a "
            f"multiple of {block} from {block} to {num_blocks * block}"
        )
    return num_blocks
