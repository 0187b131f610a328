"""A slice as the two factors of a LoRA, one of them one-hot, and back; see `s2kernels.lora`."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from s2kernels.adapter import Slice


def to_factors(
    name: str, part: Slice, shape: tuple[int, int], rank: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """lora_A (rank, K) and lora_B (N, rank) of one slice of a weight of shape (N, K)."""
    num_out, num_in = shape
    num = len(part.index)
    fits = num_out if part.dim == "in" else num_in, num_in if part.dim == "in" else num_out
    if part.delta.shape[1 - part.axis] != fits[0] or int(part.index.max()) >= fits[1]:
        raise ValueError(
            f"{name}: delta {tuple(part.delta.shape)} with {part.dim}put channels up to "
            f"{int(part.index.max())} does not fit the base's weight {shape}"
        )
    lora_a = torch.zeros(rank, num_in, dtype=dtype or part.delta.dtype, device="cpu")
    lora_b = torch.zeros(num_out, rank, dtype=dtype or part.delta.dtype, device="cpu")
    if part.dim == "in":
        lora_a[torch.arange(num, device="cpu"), part.index] = 1
        lora_b[:, :num] = part.delta
    else:
        lora_a[:num] = part.delta
        lora_b[part.index, torch.arange(num, device="cpu")] = 1
    return lora_a, lora_b


def to_expert_factors(
    name: str, part: Slice, shape: tuple[int, ...], rank: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """lora_A (E * rank, K) and lora_B (N, rank * E) of one tensor of experts, (E, N, K)."""
    num_experts, num_out, num_in = shape
    if len(part.delta) != num_experts:
        raise ValueError(
            f"{name}: the adapter trains {len(part.delta)} experts, the base has {num_experts}"
        )
    each = [
        to_factors(name, part.of_expert(expert), (num_out, num_in), rank, dtype)
        for expert in range(num_experts)
    ]
    lora_a = torch.cat([a for a, _ in each])
    lora_b = torch.stack([b for _, b in each], dim=2)
    return lora_a, lora_b.reshape(num_out, rank * num_experts)


def to_slice(name: str, factors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Slice | None:
    """The slice that the factors of one module are, None where they come to nothing."""
    if len(factors) != 2:
        raise ValueError(f"{name}: lora_A or lora_B is missing")
    lora_a, lora_b = factors["lora_A"], factors["lora_B"]
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"{name}: lora_A (r, K) and lora_B (N, r) wanted, "
            f"got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        )
    scaling = _scaling(name, lora_a.shape[0], config)
    for dim, selector, delta in (("in", lora_a, lora_b), ("out", lora_b.t(), lora_a.t())):
        rows = _one_hot_rows(selector)
        if rows is None or not len(rows):
            continue
        index = selector[rows].argmax(1).to(torch.int32)
        delta = delta[:, rows]
        if scaling != 1:
            delta = delta.to(torch.promote_types(delta.dtype, torch.float32)) * scaling
        try:
            return Slice(dim, index, (delta if dim == "in" else delta.t()).contiguous())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if not lora_a.any() or not lora_b.any():
        return None
    raise ValueError(
        f"{name}: no slice of an S2FT adapter: neither every row of lora_A nor every column of "
        "lora_B is zero or has a single 1"
    )


def _one_hot_rows(selector: Tensor) -> Tensor | None:
    """The rows (r,) of a matrix that are not zero; None unless each of them has a single 1."""
    nonzero = selector != 0
    if (nonzero.sum(1) > 1).any() or (selector[nonzero] != 1).any():
        return None
    return nonzero.any(1).nonzero().flatten()


def _scaling(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """What PEFT multiplies lora_B lora_A with in this module."""
    from peft.utils.other import get_pattern_key

    pattern: dict[str, float] = config.get("alpha_pattern") or {}
    key = get_pattern_key(list(pattern), name)
    alpha: float = pattern[key] if key in pattern else config.get("lora_alpha", 8)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
