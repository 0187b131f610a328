"""What the base model's weights hold at any time, and the way back to what they were.

Two things are done to them, both undone bit for bit:

    basis    co-permutation: heads and channels of a structure are reordered (layout "permute")
    slices   W0 + delta is written where an adapter is trained in place (mode "inplace")

A forward of the model engages both. `state_dict`, `load_state_dict`, unloading and deleting an
adapter release both, so whoever reads or writes the weights through them meets the original basis
and W0. A disabled adapter and an exception in a forward release the slices. The next forward, or a
backward that needs the weights, engages again.
"""

import sys
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from s2kernels import backend
from s2kernels.autograd.joined import is_alone, join_
from s2kernels.coupling import Structure, obstacle
from s2kernels.peft.frames import is_running
from s2kernels.peft.fused import fuse, unfuse
from s2kernels.peft.loaded import check_none_is_merged
from s2kernels.permute import Permutation, apply_, plan, undo_

if TYPE_CHECKING:
    from s2kernels.peft.layer import S2FTLayer


_SHARDED = "FSDP gathers the weights anew for each forward and backward"


class BaseWeights:
    """Keeper of the base weights of one model; its S2FT layers and its hooks call it.

    `model` is the one that PEFT injects into. `layers` are its S2FT layers, `structures` its
    coupled structures by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: list[S2FTLayer] = []
        self.structures: dict[str, Structure] = {}
        self.permutations: dict[str, Permutation] = {}
        self.engaged = False
        self.attached = False
        self._forward_frame: FrameType | None = None
        # of a mixed batch: the adapter of each row, while its forward runs
        self.adapter_names: list[str] | None = None
        self._num_owners: dict[int, int] = {}
        self._inspected = 0  # id of the model at that time: a deep copy has other parameters
        self._sharded = False
        self._hooks: list = []
        self._fused: list[nn.Module] = []

    def __getstate__(self) -> dict:
        # of copies and pickles: a frame is neither
        return self.__dict__ | {"_forward_frame": None}

    def attach(self, layers: Iterable["S2FTLayer"], structures: dict[str, Structure]) -> None:
        """Take charge of `layers`: all S2FT layers of the model. Hooks are set as they are needed.

        Raises ValueError where layout="permute" cannot be had.
        """
        self.detach()
        self.layers = list(layers)
        self.structures = structures
        self.inspect()
        self._plan()
        for module in self._owners():
            self._hooks += [
                module.register_state_dict_pre_hook(self._on_state_dict),
                module.register_load_state_dict_pre_hook(self._on_load_state_dict),
            ]
        self._fused = fuse(self)
        self.attached = True
        # A model that needs neither basis nor slices keeps a forward without hooks, which
        # torch.compile can take in one graph.
        if any(
            layer.layouts[name] in ("auto", "permute") or layer.modes[name] != "additive"
            for layer in self.layers
            for name in layer.s2ft_delta
        ):
            self._hooks += [
                self.model.register_forward_pre_hook(self._before_forward),
                self.model.register_forward_hook(self._after_forward, always_call=True),
            ]

    def detach(self) -> None:
        """Restore the weights, remove the hooks and the forwards of fused parts."""
        self.release()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        unfuse(self._fused)
        self._fused = []
        self.attached = False

    def engage(self) -> None:
        """Bring the weights into the working basis, if they are not in it.

        Raises ValueError where layout="permute" cannot be had; the weights are then untouched.
        """
        if self.engaged:
            return
        self.inspect()
        permutations = self._plan()
        try:
            for name, permutation in permutations.items():
                if name not in self.permutations:  # a release may have failed half-way
                    apply_(self.model, self.structures[name], permutation)
                    self.permutations[name] = permutation
            self.engaged = True
        finally:
            if not self.engaged:
                self._undo_permutations()
            self._locate()

    def release(self) -> None:
        """Give the weights back as they were: W0, in the original basis.

        Raises RuntimeError in the middle of a forward: the layers still to come would not be in the
        basis of those that went before.
        """
        if self.permutations and self.in_forward:
            raise RuntimeError(
                "the base weights cannot be given back inside a forward, by a state_dict in a hook "
                "for one: call it after the forward, or use layout='gather'"
            )
        self.restore(self.layers)
        if self.engaged or self.permutations:
            self.engaged = False
            try:
                self._undo_permutations()
            finally:
                self._locate()

    @property
    def in_forward(self) -> bool:
        """Whether a forward of the model is running that has written the slices."""
        return is_running(self._forward_frame)

    def _owners(self) -> list[nn.Module]:
        """The model and all of its parts that hold a weight which is written or permuted."""
        names = {layer.name for layer in self.layers} | set(self.structures)
        parts = {name[:end] for name in names for end in _ends(name)}
        return [self.model, *(self.model.get_submodule(name) for name in sorted(parts))]

    def write(self, adapters: Iterable[tuple["S2FTLayer", str]]) -> None:
        """Write W0 + delta of one adapter a layer into the weights, by one launch a device."""
        adapters = list(adapters)
        self.restore([layer for layer, name in adapters if layer.written not in (None, name)])
        for layer, name in adapters:
            if layer.written is None:
                layer.base_slice = layer.take_base_slice(name)
                layer.written = name
        pairs = [layer.entries(name, layer.s2ft_delta[name]) for layer, name in adapters]
        self.write_entries([entry for entries in pairs for entry in entries])

    def write_before(self, layers: Iterable["S2FTLayer"], name: str) -> None:
        """Have the adapter's slices in the weights of layers that are about to be used.

        A forward of the whole model has written all slices by one launch. What comes from elsewhere
        (a recomputed checkpoint, a call of a submodule) writes its own.
        """
        inside = self.in_forward
        self.write([(layer, name) for layer in layers if not inside or layer.written != name])

    def join(self, first: Tensor, second: Tensor) -> None:
        """Lay two frozen weights one after the other, unless that would cost lasting memory, or
        they belong to others, too.
        """
        if not (self._is_ours(first) and self._is_ours(second)):
            return  # as when they are joined: neither has a storage of its own then
        self.inspect()  # FSDP may have come since; where it has, the next call ends above
        if not self._sharded:
            join_(first, second)

    def _is_ours(self, weight: Tensor) -> bool:
        ours = is_alone(weight) and not weight.is_inference() and not weight.is_meta
        return ours and self.not_inplace(weight) is None

    def restore(self, layers: Iterable["S2FTLayer"]) -> None:
        """Put W0 back into the layers where a slice is written, by one launch a device."""
        layers = [layer for layer in layers if layer.written is not None]
        pairs = [layer.entries(str(layer.written), None) for layer in layers]
        self.write_entries([entry for entries in pairs for entry in entries])
        for layer in layers:
            layer.written = layer.base_slice = None

    def write_entries(self, entries: list[tuple]) -> None:
        """`slice_write` of the entries, device by device."""
        devices: dict[torch.device, list[tuple]] = {}
        for entry in entries:
            devices.setdefault(entry[0].device, []).append(entry)
        for on_device in devices.values():
            backend.select(on_device[0][0]).slice_write(*zip(*on_device, strict=True))

    def to_working(self, layer: "S2FTLayer", index: Tensor) -> Tensor:
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

    def not_inplace(self, weight: Tensor) -> str | None:
        """Why no slice of this weight can be written, as far as the rest of the model decides."""
        if self._sharded:
            return _SHARDED
        owners = self._num_owners.get(id(weight), 1)
        return f"the weight is shared by {owners} modules" if owners > 1 else None

    def inspect(self) -> None:
        """Look for what forbids writing into weights: once more before they are engaged, for FSDP2
        comes after the adapter was made, and shows a plain weight in the middle of a forward.
        """
        self._inspected = id(self.model)
        self._num_owners = {}
        for _, value in self.model.named_parameters(remove_duplicate=False):
            self._num_owners[id(value)] = self._num_owners.get(id(value), 0) + 1
        self._sharded = any(isinstance(module, FSDPModule) for module in self.model.modules())

    def _plan(self) -> dict[str, Permutation]:
        """The permutation of each structure that an adapter wants permuted, where it can be had."""
        wanted: dict[str, list[tuple[S2FTLayer, str]]] = {}
        for layer in self.layers:
            for name, layout in layer.layouts.items():
                if layer.structure is not None and layout in ("auto", "permute"):
                    wanted.setdefault(layer.structure, []).append((layer, name))
        permutations = {}
        for structure_name, candidates in wanted.items():
            # The first adapter decides for all, and among its targets the in-slice: it is the one
            # whose copies of activations gain from a contiguous run.
            first = [layer for layer, name in candidates if name == candidates[0][1]]
            layer = next((layer for layer in first if layer.dim == "in"), first[0])
            name = candidates[0][1]
            structure = self.structures[structure_name]
            assert layer.member is not None
            reason = _SHARDED if self._sharded else obstacle(self.model, structure)
            permutation = None
            if reason is None:  # else the index may have no values either
                units = structure.units_at(layer.member, layer.s2ft_index[name].cpu())
                permutation = plan(structure, units)
            if permutation is not None:
                permutations[structure_name] = permutation
            elif layer.layouts[name] == "permute":
                reason = reason or "its heads lie in more than two partly selected KV groups"
                raise ValueError(
                    f"layout='permute' cannot be had for {structure_name}: {reason}; "
                    "use layout='auto' or 'gather'"
                )
        return permutations

    def _undo_permutations(self) -> None:
        for name in list(self.permutations):
            undo_(self.model, self.structures[name], self.permutations[name])
            del self.permutations[name]

    def _locate(self) -> None:
        for layer in self.layers:
            layer.locate()

    def _before_forward(self, module: nn.Module, args) -> None:
        if module is not self.model:
            raise RuntimeError(
                "nn.DataParallel copies the weights before the slices are written into them; use "
                "DistributedDataParallel, or S2FTConfig(mode='additive', layout='gather')"
            )
        if self._inspected != id(self.model):
            self.inspect()
        changed = self.permutations or any(layer.written for layer in self.layers)
        if changed and any(isinstance(layer.weight, DTensor) for layer in self.layers):
            raise RuntimeError(
                "the model was sharded after its first forward, while the weights held what was "
                "trained: shard it before, or call state_dict() first"
            )
        for layer in self.layers:
            layer.refresh()
        self.engage()
        adapters = [(layer, layer.inplace_adapter()) for layer in self.layers]
        self.restore([layer for layer, name in adapters if name is None])
        self.write([(layer, name) for layer, name in adapters if name is not None])
        self._forward_frame = None if torch.compiler.is_compiling() else sys._getframe(1)

    def _after_forward(self, module: nn.Module, args, output) -> None:
        self._forward_frame = None
        if sys.exc_info()[0] is not None:
            self.restore(self.layers)

    def _on_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.release()

    def _on_load_state_dict(self, module: nn.Module, *args) -> None:
        check_none_is_merged(self.layers)
        self.release()


def _ends(name: str) -> list[int]:
    """Where the names of a module and of those that hold it end: "a.b" gives 1 and 3."""
    return [i for i, letter in enumerate(name) if letter == "."] + [len(name)]
