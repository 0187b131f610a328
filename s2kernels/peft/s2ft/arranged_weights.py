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
from torch._subclasses.fake_tensor import FakeTensor

from s2kernels import backend
from s2kernels.autograd.joined import is_alone, join_
from s2kernels.capturing import is_capturing
from s2kernels.coupling import Structure, base_layer, obstacle, parameter
from s2kernels.peft.host.kept_buffers import has_values
from s2kernels.peft.host.obstacles import Obstacles
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
        self._joined: list[Tensor] = []

    @property
    def moved(self) -> bool:
        """Whether anything is permuted."""
        return bool(self.permutations)

    def moves(self, layers: Sequence[Any]) -> bool:
        """Whether any layer wants its structure permuted."""
        return any("permute" in layer.layouts.values() for layer in layers)

    def engage(self, layers: Sequence[Any], why_not: str | None, whole: bool) -> None:
        """Bring the weights into the working basis.

        why_not: what forbids it in the whole model, or None. Raises ValueError where a layer's
        layout="permute" cannot be had, and RuntimeError unless the whole model is about to be
        called: of a part, some layers have been already. The weights are then untouched.
        """
        permutations = self.plan(layers, why_not)
        if permutations and not whole:
            raise RuntimeError(
                "layout='permute' reorders channels when the whole model is called, and a part of "
                "it was called first, or after a state_dict: call the model before its parts, or "
                "use layout='gather'"
            )
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
            address = value.data_ptr()
            if address in joined or address in moved:
                state[key] = value.detach().clone()
            if address in moved:
                name, member = moved[address]
                inverse = self.permutations[name].inverse()
                reorder_(state[key], self.structures[name], member, inverse)

    def _layers_of(self, name: str) -> list[nn.Module]:
        paths = [f"{name}.{member.suffix}" for member in self.structures[name].members]
        return [base_layer(self.model, path.rpartition(".")[0]) for path in paths]

    def join_pairs(self, obstacles: Obstacles) -> None:
        """Lay the frozen weights of all `pairs` one after the other that are on a GPU and this
        model's alone to move, unless that would cost lasting memory.

        The weights of a pair lay in segments of the allocator that are too small for both together,
        so they stay reserved and empty: 86 + 86 MiB a layer of LLaMA-2-7B, about 5.5 GB in all.
        They are given back to the device once, after the last pair.
        """
        before = len(self._joined)
        for first, second in self.pairs:
            weights = first.weight, second.weight
            if (
                are_alike(weights)
                and backend.prefers_joined(first.weight)
                and all(obstacles.of(w) is None and has_values(w) and is_alone(w) for w in weights)
            ):
                join_(*weights)
                self._joined += weights
        moved = len(self._joined) > before
        if moved and torch.accelerator.is_available() and not is_capturing():
            torch.accelerator.empty_cache()

    def to_working(self, layer: Any, index: Tensor) -> Tensor:
        """Where the channels `index` of the layer lie in the present basis, int32 like `index`."""
        if layer.structure is None or layer.structure.name not in self.permutations:
            return index
        inverse = self.permutations[layer.structure.name].inverse()
        order = inverse.channels_of_each_expert(layer.member).to(index.device)
        return torch.take_along_dim(order, index.long().view(len(order), -1), 1).view_as(index)

    def plan(self, layers: Sequence[Any], why_not: str | None) -> dict[str, Permutation]:
        """The permutation of each structure that an adapter wants permuted; raises as `engage`."""
        wanted: dict[str, list[tuple[Any, str]]] = {}
        for layer in layers:
            for name, layout in layer.layouts.items():
                if layout == "permute":
                    wanted.setdefault(layer.structure.name, []).append((layer, name))
        permutations = {}
        for structure_name, candidates in wanted.items():
            # The first adapter decides for all, and among its targets the in-slice: it is the one
            # whose copies of activations gain from a contiguous run.
            first, name = candidates[0]
            own = (layer for layer, each in candidates if each == name and layer.dim == "in")
            layer = next(own, first)
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
            structure = self.structures[name]
            # layers that have come in their places since are in the original basis
            layers = zip(self._permuted[name], self._layers_of(name), strict=True)
            pairs = zip(structure.members, layers, strict=True)
            kept = tuple(member for member, (before, now) in pairs if before is now)
            undo_(self.model, replace(structure, members=kept), self.permutations[name])
            del self.permutations[name], self._permuted[name]


def are_alike(weights: Sequence[Tensor]) -> bool:
    """Whether all weights are plain or fake parameters, frozen, of one dtype and on one device."""
    first = weights[0]
    return all(
        type(weight) in (nn.Parameter, FakeTensor)
        and not weight.requires_grad
        and weight.is_floating_point()
        and weight.dtype == first.dtype
        and weight.device == first.device
        for weight in weights
    )


def arrangement_of(keeper: WeightKeeper) -> ArrangedWeights:
    """How the weights of an S2FT model's keeper are arranged."""
    assert isinstance(keeper.arrangement, ArrangedWeights)
    return keeper.arrangement
