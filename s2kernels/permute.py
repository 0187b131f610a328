"""Co-permutation: moving the selected heads or channels of a structure next to each other.

Every slice that is trained is then one dense submatrix (S2FT section 3.1). Only moves that leave
the model's function alone are made:

    FFN channels       in any order, those of an expert among themselves
    KV groups          as units: the KV head together with the query heads that read it
    query heads        within their KV group

Under grouped-query attention a set of query heads can therefore be made contiguous if and only if
at most two KV groups are partly selected: one on either side of the wholly selected groups.

Two bases: *original* is the order of the checkpoint, *working* the order after the permutation.
An order is an int64 tensor on the CPU with order[i] = original position of working position i.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2kernels.architectures import Member, Unit
from s2kernels.coupling import Structure, channels_of_heads, obstacle, parameter


@dataclass(frozen=True, eq=False)
class Permutation:
    """The order of every kind of unit in one structure.

    orders       for each unit ("query_head" and "kv_head", or "channel") an int64 tensor (count,)
    head_dim     the channels of a head; not used for unit "channel"
    start        the working position, in units, at which the run begins that `plan` was asked for;
                 an inverse carries it along unchanged
    num_experts  each has its own part of the order; see `Structure`

    Under grouped-query attention the run holds the selected heads in an order of its own, which
    need not ascend. Translate, never assume: `to_original(run)` names the channel at each position.
    """

    orders: dict[Unit, Tensor]
    head_dim: int = 1
    start: int = 0
    num_experts: int = 1

    def to_working(self, index: Tensor, along: Unit | Member) -> Tensor:
        """Working positions, int32 (n,), of the original channel positions `index`, integer (n,).

        `along` is the axis that `index` counts on: a parameter's, or one that holds a single kind
        of unit and nothing else, "query_head" for the outputs of q_proj and the inputs of o_proj,
        "kv_head" for the outputs of k_proj and v_proj, "channel" for the FFN. The answer is on the
        device of `index`, in its order.

        Raises ValueError for a position outside the axis or a unit that the structure lacks.
        """
        return _take(self.inverse().channels(along), index)

    def to_original(self, index: Tensor, along: Unit | Member) -> Tensor:
        """Original positions of the working channel positions `index`: undoes `to_working`."""
        return _take(self.channels(along), index)

    def inverse(self) -> "Permutation":
        """The permutation that takes the working basis back to the original one."""
        orders = {unit: torch.argsort(order) for unit, order in self.orders.items()}
        return Permutation(orders, self.head_dim, self.start, self.num_experts)

    def channels(self, along: Unit | Member) -> Tensor:
        """The order along an axis, channel by channel, int32; experts one after the other."""
        return _count_through(self.channels_of_each_expert(along))

    def channels_of_each_expert(self, along: Unit | Member) -> Tensor:
        """The same as (num_experts, n), counted within the expert."""
        units, blocks = ((along,), 1) if isinstance(along, str) else (along.units, along.blocks)
        segments, size = [], 0
        for unit in units:
            if unit not in self.orders:
                raise ValueError(f"unit must be one of {', '.join(self.orders)}, got {unit!r}")
            order = self.orders[unit].view(self.num_experts, -1)
            width = 1 if unit == "channel" else self.head_dim * blocks
            segment = channels_of_heads((order % order.shape[1]).flatten(), width) + size
            segments.append(segment.view(self.num_experts, -1))
            size += segments[-1].shape[1]
        return torch.cat(segments, dim=1)


def plan(structure: Structure, selected_units: Tensor) -> Permutation | None:
    """The permutation that makes the selected units one contiguous run; None if there is none.

    selected_units: query heads or FFN channels in the original basis, integer (n,), ascending.

    The run begins at position 0, except where two KV groups are partly selected: there the first
    of them leads, with its selected heads last, and `start` says where the run begins. Whatever
    the contiguity does not move keeps its original order. Experts have a run each.

    Raises TypeError for an index that is not an integer tensor, ValueError for one that is empty,
    does not ascend strictly, or leaves the structure.
    """
    total = structure.count(structure.unit)
    chosen = _mask(selected_units, total, f"selected_units of {structure.name}")
    if structure.kind != "attention":
        rank = (~chosen).long().view(structure.num_experts, -1)
        order = _count_through(torch.argsort(rank, dim=1, stable=True))
        return Permutation({"channel": order}, num_experts=structure.num_experts)

    chosen = chosen.view(structure.num_kv_heads, -1)
    counts = chosen.sum(1)
    whole = counts == chosen.shape[1]
    partial = torch.nonzero((counts > 0) & ~whole).flatten().tolist()
    if len(partial) > 2:
        return None

    # groups in the order: [first partial,] whole, [partial,] none
    group_rank = torch.where(whole, 1, 3)
    head_rank = (~chosen).long()  # within a group, the selected heads come first
    start = 0
    if partial:
        group_rank[partial[-1]] = 2
    if len(partial) == 2:
        first = partial[0]
        group_rank[first] = 0
        head_rank[first] = chosen[first].long()
        start = int((~chosen[first]).sum())

    kv_heads = torch.argsort(group_rank, stable=True)
    within = torch.argsort(head_rank, dim=1, stable=True)
    heads = within + torch.arange(len(within), device="cpu").unsqueeze(1) * within.shape[1]
    orders: dict[Unit, Tensor] = {"query_head": heads[kv_heads].flatten(), "kv_head": kv_heads}
    return Permutation(orders, structure.head_dim, start)


def apply_(model: nn.Module, structure: Structure, permutation: Permutation) -> None:
    """Permute the parameters of `structure` in place, from the original to the working basis.

    Weights and biases keep their identity, storage and dtype; their version counters move on, so
    autograd notices if it had saved one. It needs memory for a copy of one parameter. Applying
    `permutation.inverse()` restores every bit. If anything fails on the way, what was permuted by
    then is put back before the exception goes on.

    Raises ValueError, before anything changes, if the parameters cannot be permuted (see
    `s2kernels.coupling.obstacle`) or the permutation belongs to a structure of another size.
    """
    reason = obstacle(model, structure)
    if reason is not None:
        raise ValueError(f"{structure.name} cannot be permuted: {reason}")
    if permutation.num_experts != structure.num_experts:
        raise ValueError(
            f"permutation has the orders of {permutation.num_experts} experts, "
            f"{structure.name} has {structure.num_experts}"
        )
    for member in structure.members:
        wanted = structure.num_experts * structure.size(member)
        got = len(permutation.channels(member))
        if got != wanted:
            raise ValueError(
                f"permutation orders {got} channels of unit {member.unit}, "
                f"{structure.name} has {wanted}"
            )
    _reorder_all_(model, structure, permutation)


def undo_(model: nn.Module, structure: Structure, permutation: Permutation) -> None:
    """Put back what `apply_` has permuted, whatever has become of the model since."""
    _reorder_all_(model, structure, permutation.inverse())


def _reorder_all_(model: nn.Module, structure: Structure, permutation: Permutation) -> None:
    inverse = permutation.inverse()
    done = []
    try:
        for member in structure.members:
            reorder_(parameter(model, structure, member), structure, member, permutation)
            done.append(member)
    except BaseException:
        for member in done:
            reorder_(parameter(model, structure, member), structure, member, inverse)
        raise


@torch.no_grad()
def reorder_(value: Tensor, structure: Structure, member: Member, permutation: Permutation) -> None:
    """Permute in place a tensor that is, or is a copy of, the parameter of a member."""
    axis = member.axis
    orders = permutation.channels_of_each_expert(member).to(value.device)
    if structure.kind != "experts":
        # one expression: a name for the copy would keep it alive while the next one is made
        value.copy_(value.index_select(axis, orders[0]))
        return
    for expert, order in zip(value, orders, strict=True):
        expert.copy_(expert.index_select(axis - 1, order))


def _count_through(orders: Tensor) -> Tensor:
    """(experts, n), counted within each row, as (experts * n,)."""
    first = torch.arange(len(orders), dtype=orders.dtype, device=orders.device) * orders.shape[1]
    return (orders + first.unsqueeze(1)).flatten()


def _take(table: Tensor, index: Tensor) -> Tensor:
    _require_integers(index, "index")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(table):
        raise ValueError(
            f"index: positions from 0 to {len(table) - 1} wanted, "
            f"got {int(index.min())} to {int(index.max())}"
        )
    return table.to(index.device)[index.long()]


def _mask(selected: Tensor, total: int, name: str) -> Tensor:
    _require_integers(selected, name)
    selected = selected.detach().to("cpu", torch.int64)
    if selected.ndim != 1 or selected.numel() == 0:
        raise ValueError(f"{name}: shape (n,) with n > 0 wanted, got {tuple(selected.shape)}")
    if bool((falls := selected[1:] <= selected[:-1]).any()):
        at = int(falls.nonzero()[0])
        raise ValueError(
            f"{name}: strictly ascending positions wanted, "
            f"got {int(selected[at])} before {int(selected[at + 1])}"
        )
    if selected[0] < 0 or selected[-1] >= total:
        raise ValueError(
            f"{name}: positions from 0 to {total - 1} wanted, "
            f"got {int(selected[0])} to {int(selected[-1])}"
        )
    mask = torch.zeros(total, dtype=torch.bool, device="cpu")
    mask[selected] = True
    return mask


def _require_integers(index: Tensor, name: str) -> None:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name}: an int32 or int64 tensor wanted, got {got}")
