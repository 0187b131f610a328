"""The linear layers of a mixture of experts, of which only slices are trained.

Sizes: M tokens, E experts of which each token goes to T, S = M * T pairs of a token and an expert,
sorted by expert. Subscript e: the pairs of expert e. With W_e = W0_e + scatter(delta_e, index_e):

    y_e = x_e W_eᵀ        dx_e = dy_e W_e
    dim="in"   d_delta_e = dy_eᵀ x_e[:, index_e]     saves a copy of those channels, (S, R)
    dim="out"  d_delta_e = dy_e[:, index_e]ᵀ x_e     saves x

Gradients of whole weights are never computed. y and dx are one grouped GEMM where torch has one,
else a GEMM for each expert. The copy for dim="in" is one op for all experts, and so is d_delta, by
a kernel of ours: torch's grouped GEMM answers in the dtype of its operands, and d_delta is not to
be rounded to bf16. What mode="additive" adds to y and dx is an op for each expert.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2kernels import backend
from s2kernels.autograd.accumulate import owner_of, slot_of
from s2kernels.autograd.checks import check_index, compute_dtype
from s2kernels.autograd.first_order import cast, first_order
from s2kernels.autograd.linear import join_index, split_index
from s2kernels.reference import Index, take
from s2kernels.update import Update

Ops = ModuleType | SimpleNamespace


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert, as pairs sorted by expert.

    order    int64 (S,), of each pair: token * T + which of the token's experts
    inverse  int64 (S,), where each of those lies in `order`
    offsets  int32 (E,), where the pairs of each expert end, on the device
    ends     the same as numbers
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    ends: tuple[int, ...]
    experts_per_token: int


def route(experts: Tensor, num_experts: int) -> Routing:
    """The routing of `experts`, integers (M, T) below num_experts. It waits for the device, once.

    Raises ValueError for an expert that is not among them, as expert parallelism marks those of
    other ranks.
    """
    ranked, order = experts.flatten().sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    # not bincount, which asks the device twice by itself: for the smallest and the largest expert
    up_to = torch.arange(-1, num_experts, dtype=ranked.dtype, device=ranked.device)
    found = torch.searchsorted(ranked, up_to, right=True)
    negative, *ends = found.tolist()
    if negative or ends[-1] < len(ranked):
        wrong = int(ranked[0 if negative else -1])
        raise ValueError(
            f"experts 0 to {num_experts - 1} wanted, got {wrong}: slices of experts that are "
            "spread over processes cannot be trained"
        )
    return Routing(order, inverse, found[1:].int(), tuple(ends), experts.shape[1])


def experts_forward(
    module: Any,
    x: Tensor,
    experts: Tensor,
    scores: Tensor,
    gate_up: Callable[[Tensor, Routing], Tensor],
    down: Callable[[Tensor, Routing], Tensor],
) -> Tensor:
    """What the experts of Mixtral and Qwen3-MoE compute of tokens x (M, K), y (M, K):

        y[t] = sum over i of scores[t, i] * down(gate(gate_up(x[t]))) of expert experts[t, i]

    module   the experts' module of transformers: it knows their number and the gate
    gate_up  (M, K) to pairs (S, 2 F); down: pairs (S, F) to pairs (S, K); see `expert_linear`
    """
    routing = route(experts, module.num_experts)
    y = down(module._apply_gate(gate_up(x, routing)), routing)
    y = y * scores.flatten().index_select(0, routing.order).unsqueeze(1)
    return _of_tokens(y, routing.inverse, routing.experts_per_token).to(x.dtype)


def expert_linear(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    *,
    from_tokens: bool,
    delta: Tensor | None = None,
    index: Index = slice(0, 0),
    dim: str = "in",
    holding: AbstractContextManager | None = None,
    impl: str | None = None,
) -> Tensor:
    """y (S, N) with the weight of each pair's expert, which holds W0 + delta (mode="inplace").

    x            (M, K) with from_tokens, where each pair reads its token, else (S, K)
    weight       (E, N, K), frozen
    delta        (E, N, R) for dim="in", (E, R, K) for dim="out"; None trains nothing
    index        R trained channels: int32 (E, R), or the slice that is the same in all experts
    holding      a context for the backward: see `s2kernels.autograd.linear.linear`

    Gradients: x, delta. Arguments are not checked: the host has done so.
    """
    index_tensor, start = split_index(index)
    return S2ExpertLinearFunction.apply(
        x.to(compute_dtype(x)),
        weight,
        delta,
        index_tensor,
        start,
        dim,
        *(routing.order, routing.inverse, routing.offsets, routing.ends),
        routing.experts_per_token if from_tokens else 0,
        holding,
        impl,
    )


def expert_delta(
    y: Tensor,
    x: Tensor,
    delta: Tensor,
    index: Index,
    dim: str,
    routing: Routing,
    *,
    from_tokens: bool,
    impl: str | None = None,
) -> Tensor:
    """Adds the slices' part to y (S, N), in place (mode="additive"); see `expert_linear`."""
    index_tensor, start = split_index(index)
    return S2ExpertDeltaFunction.apply(
        y,
        x.to(compute_dtype(x)),
        delta,
        index_tensor,
        start,
        dim,
        *(routing.order, routing.inverse, routing.offsets, routing.ends),
        routing.experts_per_token if from_tokens else 0,
        impl,
    )


def check_positions(name: str, index: Tensor, size: int) -> int:
    """`check_index` of an index (R,), or of each row of one of experts (E, R)."""
    if isinstance(index, Tensor) and index.dim() == 2 and len(index):
        rows = index if index.is_meta else index.cpu()  # one transfer, not one for each expert
        return [check_index(name, row, size) for row in rows][0]
    return check_index(name, index, size)


class S2ExpertLinearFunction(torch.autograd.Function):
    """y (S, N); see `expert_linear`. per_token is T where x holds tokens, 0 where it holds pairs;
    index is None where the slice starts at `start` in every expert.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        delta,
        index,
        start,
        dim,
        order,
        inverse,
        offsets,
        ends,
        per_token,
        holding,
        impl,
    ):
        ops = backend.select(x, impl)
        needs_dx, _, needs_delta = ctx.needs_input_grad[:3]
        pairs = _of_pairs(x, order, per_token)
        operand = None
        if needs_delta:
            operand = _take_each(pairs, index, start, delta, offsets) if dim == "in" else x
        ctx.save_for_backward(
            operand,
            weight if needs_dx else None,
            delta,
            *(index, order, inverse, offsets),
        )
        ctx.start, ctx.dim, ctx.ends, ctx.per_token = start, dim, ends, per_token
        ctx.holding, ctx.impl, ctx.owned = holding if needs_dx else None, impl, owner_of(delta)
        return _grouped(ops.linear, pairs, cast(weight, x.dtype).mT, offsets, ends)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        operand, weight, delta, index, order, inverse, offsets = ctx.saved_tensors
        ops = backend.select(dy, ctx.impl)
        dx = d_delta = None
        dy = dy.contiguous()
        if weight is not None:
            dx = _grouped(ops.linear, dy, cast(weight, dy.dtype), offsets, ctx.ends)
            dx = _of_tokens(dx, inverse, ctx.per_token)
        if operand is not None:
            if ctx.dim == "out":
                operand = _of_pairs(operand, order, ctx.per_token)
            d_delta = _delta_grad(ops, dy, operand, delta, index, offsets, ctx)
        return dx, None, d_delta, *[None] * 10


class S2ExpertDeltaFunction(torch.autograd.Function):
    """y + the slices' part, in y; see `expert_delta` and `S2ExpertLinearFunction`."""

    @staticmethod
    def forward(
        ctx,
        y,
        x,
        delta,
        index,
        start,
        dim,
        order,
        inverse,
        offsets,
        ends,
        per_token,
        impl,
    ):
        ops = backend.select(x, impl)
        _, needs_dx, needs_delta = ctx.needs_input_grad[:3]
        pairs = _of_pairs(x, order, per_token)
        compact = dim == "in"
        operand = _take_each(pairs, index, start, delta, offsets) if compact else pairs
        for expert, rows in _groups(ends):
            where = None if compact else _where(index, start, delta, dim, expert)
            ops.slice_linear_(y[rows], operand[rows], delta[expert], where, dim)
        ctx.mark_dirty(y)
        kept = operand if compact else x
        ctx.save_for_backward(kept if needs_delta else None, delta, index, order, inverse, offsets)
        ctx.needs_dx, ctx.in_features = needs_dx, x.shape[1]
        ctx.start, ctx.dim, ctx.ends, ctx.per_token, ctx.impl = start, dim, ends, per_token, impl
        ctx.holding, ctx.owned = None, owner_of(delta)
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        operand, delta, index, order, inverse, offsets = ctx.saved_tensors
        ops = backend.select(dy, ctx.impl)
        dx = d_delta = None
        dy = dy.contiguous()
        if ctx.needs_dx:
            dx = dy.new_zeros(dy.shape[0], ctx.in_features)
            for expert, rows in _groups(ctx.ends):
                where = _where(index, ctx.start, delta, ctx.dim, expert)
                ops.slice_linear_dx_(dx[rows], dy[rows], delta[expert], where, ctx.dim)
            dx = _of_tokens(dx, inverse, ctx.per_token)
        if operand is not None:
            if ctx.dim == "out":
                operand = _of_pairs(operand, order, ctx.per_token)
            d_delta = _delta_grad(ops, dy, operand, delta, index, offsets, ctx)
        return dy, dx, d_delta, *[None] * 9


def _delta_grad(
    ops: Ops,
    dy: Tensor,
    operand: Tensor,
    delta: Tensor,
    index: Tensor | None,
    offsets: Tensor,
    ctx: Any,
) -> Tensor | None:
    """d_delta, or None where it was added to delta.grad; see autograd.accumulate. Zero for experts
    that no token went to. An in-slice's operand is compact already.
    """
    slot = slot_of(ctx, ctx.owned)
    assert not isinstance(slot, Update)  # those are of matrices alone
    grad = torch.zeros_like(delta) if slot is None else slot
    where = None if ctx.dim == "in" else join_index(index, ctx.start, delta[0], ctx.dim)
    ops.slice_grad_each(dy, operand, offsets, where, ctx.dim, grad)
    return grad if slot is None else None


def _grouped(
    linear: Callable[[Tensor, Tensor], Tensor],
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    ends: tuple[int, ...],
) -> Tensor:
    """a_e b_e for each expert e: a (S, K) pairs, b (E, K, N), answer (S, N)."""
    if _has_grouped_gemm(a, b):
        return F.grouped_mm(a, b, offs=offsets)
    parts = [linear(a[rows], b[expert].t()) for expert, rows in _groups(ends)]
    return torch.cat(parts) if parts else a.new_empty(0, b.shape[2])


def _has_grouped_gemm(a: Tensor, b: Tensor) -> bool:
    """Whether torch multiplies all experts at once: in bf16, from rows of whole 16 bytes."""
    if a.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    if a.is_cuda and torch.cuda.get_device_capability(a.device) < (8, 0):
        return False
    return all(size * a.element_size() % 16 == 0 for size in b.shape[1:]) and len(a) > 0


def _groups(ends: tuple[int, ...]) -> list[tuple[int, slice]]:
    """The experts that have pairs, and which."""
    starts = (0, *ends)
    found = enumerate(zip(starts, ends, strict=False))
    return [(expert, slice(start, end)) for expert, (start, end) in found if end > start]


def _where(index: Tensor | None, start: int, delta: Tensor, dim: str, expert: int) -> Index:
    return join_index(None if index is None else index[expert], start, delta[expert], dim)


def _take_each(
    x: Tensor, index: Tensor | None, start: int, delta: Tensor, offsets: Tensor
) -> Tensor:
    """A copy (S, R) of the channels that each pair's expert trains."""
    if index is None:
        return take(x, _where(None, start, delta, "in", 0))
    pairs = torch.arange(len(x), dtype=offsets.dtype, device=x.device)
    experts = torch.searchsorted(offsets, pairs, right=True)
    return x.gather(1, index.long().index_select(0, experts))


def _of_pairs(x: Tensor, order: Tensor, per_token: int) -> Tensor:
    """What each pair reads of the tokens x (M, K): (S, K)."""
    return x.index_select(0, order // per_token) if per_token else x


def _of_tokens(y: Tensor, inverse: Tensor, per_token: int) -> Tensor:
    """The sum over each token's pairs: (M, N). In this order, and so the same in every run."""
    if not per_token:
        return y
    return y.index_select(0, inverse).view(-1, per_token, y.shape[1]).sum(1)
