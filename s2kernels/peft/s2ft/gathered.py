"""In place under FSDP2: weights that are gathered with the slice in them.

The trained channels lie on one axis of W (N, K) and the shards on the other: for dim="in" delta
(N, R) and W have the same rows on each process, for dim="out" delta (R, K) and W have the same
columns. So each process writes the slice of its own shard, and nothing more is exchanged.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from s2kernels import reference
from s2kernels.coupling import is_conv1d
from s2kernels.peft.s2ft.layer import copy_of_channels


class Gathered:
    """What the weight of one layer was gathered with: the `Owner` of its shards.

    layer: an S2FTLinear. adapter: the one whose slice the gathered weight holds; None for W0.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.adapter: str | None = None
        self._why_not: str | None = "it was not gathered yet"

    def write_into(self, copy: Tensor) -> None:
        """Write the slice of the active adapter into a copy of the shard of this process."""
        layer, name = self.layer, self._wanted()
        self._why_not = self._obstacle(name)
        self.adapter = name if self._why_not is None else None
        if self.adapter is None:
            return
        delta = layer.s2ft_delta[self.adapter].to_local().detach().to(copy.device)
        where = layer.positions[self.adapter]
        if isinstance(where, Tensor):
            where = where.to(copy.device)
        matrix = layer.matrix_of(copy)
        base = copy_of_channels(matrix, where, layer.dim)
        reference.slice_write([matrix], [base], [delta], [where], [layer.dim])

    def arrived(self) -> str | None:
        """The adapter whose slice the weight holds, as the layer's forward wants it; None for W0.

        Raises RuntimeError where the weight was gathered for something else, and ValueError where
        an adapter demands mode="inplace" and W0 was gathered.
        """
        if self.adapter is not None:
            self.check(self._wanted())
            return self.adapter
        for name in self.layer.active():
            if self.layer.modes[name] == "inplace":
                raise ValueError(
                    f"adapter {name!r} of {self.layer.name} has mode='inplace', and the weight "
                    f"was gathered without it: {self._why_not}; use mode='auto'"
                )
        return None

    def check(self, adapter: str | None) -> None:
        """Raises RuntimeError unless the weight holds the slice of this adapter, or for None W0."""
        if self.adapter != adapter:
            raise RuntimeError(
                f"{self.layer.name}: FSDP holds the weight with adapter {self.adapter!r}, and "
                f"{adapter!r} is wanted now: call reshard() of the module that fully_shard was "
                "given, or give it reshard_after_forward=True"
            )

    def check_given_back(self) -> None:
        """Raises RuntimeError where a gathered weight holds a slice and whoever reads it next does
        not know of it.
        """
        if not isinstance(self.layer.weight, DTensor):
            self.check(None)

    def _wanted(self) -> str | None:
        """The adapter whose slice belongs in the weight now."""
        layer = self.layer
        if not layer.keeper.attached or layer.keeper.forwards.rows is not None:
            return None
        names = layer.active()
        if len(names) != 1 or layer.weight.requires_grad:
            return None
        return None if layer.modes[names[0]] == "additive" else names[0]

    def _obstacle(self, name: str | None) -> str | None:
        """Why this process cannot write the adapter's slice into its shard; None if it can."""
        if name is None:
            return "a frozen weight and exactly one active adapter wanted"
        layer = self.layer
        delta, weight = layer.s2ft_delta[name], layer.weight
        if not (isinstance(delta, DTensor) and isinstance(weight, DTensor)):
            return "delta and the weight are not sharded together"
        axis = 1 - layer.axis
        of_weight = layer.axis if is_conv1d(layer.get_base_layer()) else axis
        if _sharded(delta) == {axis} and _sharded(weight) == {of_weight}:
            return None
        return "fully_shard was not given the shard_placement_fn that fsdp_placement returned"


def _sharded(value: DTensor) -> set[int]:
    """The axes on which it is sharded."""
    return {place.dim for place in value.placements if isinstance(place, Shard)}


class AsGathered:
    """A context for a backward: gathered weights hold the adapters that its forward saw, or W0 for
    None. Raises RuntimeError on entry where they do not.
    """

    def __init__(self, adapters: Mapping[Gathered, str | None]) -> None:
        self._adapters = adapters

    def __enter__(self) -> None:
        for gathered, adapter in self._adapters.items():
            gathered.check(adapter)

    def __exit__(self, *exc: Any) -> None:
        pass

    def writing(self, delta: Tensor) -> AbstractContextManager[None]:
        """See `s2kernels.autograd.accumulate.WeightHolder`: the next gather brings the delta."""
        return nullcontext()
