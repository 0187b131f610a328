"""How the weights of an S2FT model are arranged: co-permuted, and joined.

layout="permute" co-permutes what is coupled, so that the selected heads and channels of a structure
lie next to each other (S2FT section 3.1). Joined weights lie one after the other in one storage, so
that they are one GEMM. The keeper says when: `engage` before a forward, `release` before anybody
reads the weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from s2kernels.autograd.joined import is_alone, join_
from s2kernels.coupling import Structure, base_layer, obstacle, parameter
from s2kernels.peft.host.premises import Premises
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.permute import Permutation, apply_, plan, reorder_, undo_


class ArrangedWeights:
    """The coupled structures of one model by name, and their permutations while it is engaged."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.structures: dict[str, Structure] = {}
        self.permutations: dict[str, Permutation] = {}
        self.heads: dict[str, list[list[int]]] = {}
        self.engaged = False
        # layers whose weights are joined wherever they lie on a GPU
        self.pairs: list[tuple[nn.Linear, nn.Linear]] = []
        self._permuted: dict[str, list[nn.Module]] = {}  # by structure, the layer of each member
        self._joined: list[nn.Parameter] = []

    @property
    def moved(self) -> bool:
        """Whether anything is permuted."""
        return bool(self.permutations)

    def moves(self, layers: Sequence[Any]) -> bool:
        """Whether any layer wants its structure permuted."""
        return any("permute" in layer.layouts.values() for layer in layers)

    def engage(self, layers: Sequence[Any], why_not: str | None) -> None:
        """Bring the weights into the working basis.

        why_not: what forbids it in the whole model, or None. Raises ValueError where a layer's
        layout="permute" cannot be had; the weights are then untouched.
        """
        permutations = self.plan(layers, why_not)
        try:
            for name, permutation in permutations.items():
                if name not in self.permutations:  # a release may have failed half-way
                    apply_(self.model, self.structures[name], permutation)
                    self.permutations[name] = permutation
                    self._permuted[name] = self._layers_of(name)
            self.heads = {
                name: [order.tolist() for order in permutation.orders.values()]
                for name, permutation in permutations.items()
                if "channel" not in permutation.orders
            }
            self.engaged = True
        finally:
            if not self.engaged:
                self._undo()

    def release(self) -> bool:
        """Bring the weights back into the original basis, each in a storage of its own. Whether
        anything was permuted or joined.
        """
        found = self.moved or bool(self._joined)
        if self.moved:
            self.engaged = False
            self._undo()
        for weight in self._joined:
            if not is_alone(weight):
                weight.data = weight.data.clone()
        self._joined = []
        return found

    @property
    def intact(self) -> bool:
        """Whether the layers that were permuted are all there, without an adapter of others."""
        return all(
            layers == self._layers_of(name) and not self._obstacle(self.structures[name])
            for name, layers in self._permuted.items()
        )

    def note(self, premises: Premises) -> None:
        """Note which layers are permuted."""
        for name in self._permuted:
            for member in self.structures[name].members:
                owner, _, leaf = f"{name}.{member.suffix}".rpartition(".")[0].rpartition(".")
                premises.same_child(self.model.get_submodule(owner), leaf)
                premises.as_trainable(parameter(self.model, self.structures[name], member))

    def _obstacle(self, structure: Structure) -> str | None:
        """Why it cannot be permuted; None if it can."""
        if reason := obstacle(self.model, structure):
            return reason
        for member in structure.members:
            if parameter(self.model, structure, member).requires_grad:
                return f"{member.suffix} is trained whole, and its gradient would not move along"
        return None

    def put_back_copies(self, state: dict[str, Any]) -> None:
        """In a state_dict, put copies in the original basis in the place of permuted weights, and
        of joined ones some with a storage each.
        """
        moved = {
            parameter(self.model, self.structures[name], member).data_ptr(): (name, member)
            for name in self.permutations
            for member in self.structures[name].members
        }
        joined = {weight.data_ptr() for weight in self._joined}
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.is_meta:
                continue
            if value.data_ptr() in joined:
                state[key] = value.detach().clone()
            if value.data_ptr() in moved:
                name, member = moved[value.data_ptr()]
                state[key] = value.detach().clone()
                inverse = self.permutations[name].inverse()
                reorder_(state[key], self.structures[name], member, inverse)

    def _layers_of(self, name: str) -> list[nn.Module]:
        members = self.structures[name].members
        return [
            base_layer(self.model, f"{name}.{member.suffix}".rpartition(".")[0])
            for member in members
        ]

    def join(self, first: nn.Parameter, second: nn.Parameter) -> bool:
        """Lay two frozen weights one after the other, unless that would cost lasting memory.
        Whether they were moved.
        """
        for weight in (first, second):
            if not is_alone(weight) or weight.is_inference() or weight.is_meta:
                return False
        join_(first, second)
        self._joined += [first, second]
        return True

    def to_working(self, layer: Any, index: Tensor) -> Tensor:
        """Where the channels `index` of the layer lie in the present basis, int32 like `index`."""
        if layer.structure not in self.permutations or layer.member is None:
            return index
        permutation = self.permutations[layer.structure]
        if index.dim() == 1:
            return permutation.to_working(index, layer.member)
        # permutations count the channels of experts through
        first = torch.arange(len(index), dtype=torch.int32, device=index.device).unsqueeze(1)
        first = first * layer.num_channels
        working = permutation.to_working((index + first).flatten(), layer.member)
        return working.view_as(index) - first

    def plan(self, layers: Sequence[Any], why_not: str | None) -> dict[str, Permutation]:
        """The permutation of each structure that an adapter wants permuted; raises as `engage`."""
        wanted: dict[str, list[tuple[Any, str]]] = {}
        for layer in layers:
            for name, layout in layer.layouts.items():
                if layout == "permute" and layer.structure is not None:
                    wanted.setdefault(layer.structure, []).append((layer, name))
        permutations = {}
        for structure_name, candidates in wanted.items():
            # The first adapter decides for all, and among its targets the in-slice: it is the one
            # whose copies of activations gain from a contiguous run.
            name = candidates[0][1]
            first = [layer for layer, each in candidates if each == name]
            layer = next((layer for layer in first if layer.dim == "in"), first[0])
            structure = self.structures[structure_name]
            reason = why_not or self._obstacle(structure)
            permutation = None
            if reason is None:  # else the index may have no values either
                units = structure.units_at(layer.member, layer.s2ft_index[name].cpu())
                permutation = plan(structure, units)
                reason = "its heads lie in more than two partly selected KV groups"
            if permutation is None:
                raise ValueError(
                    f"layout='permute' cannot be had for {structure_name}: {reason}; "
                    "use layout='gather'"
                )
            permutations[structure_name] = permutation
        return permutations

    def _undo(self) -> None:
        self.heads = {}
        for name in list(self.permutations):
            structure, layers = self.structures[name], self._permuted.get(name, [])
            if layers:  # those that have come in their places since are in the original basis
                pairs = zip(structure.members, layers, self._layers_of(name), strict=True)
                kept = tuple(member for member, before, now in pairs if before is now)
                structure = replace(structure, members=kept)
            undo_(self.model, structure, self.permutations[name])
            del self.permutations[name]
            self._permuted.pop(name, None)


def arrangement_of(keeper: WeightKeeper) -> ArrangedWeights:
    """How the weights of an S2FT model's keeper are arranged."""
    assert isinstance(keeper.arrangement, ArrangedWeights)
    return keeper.arrangement
