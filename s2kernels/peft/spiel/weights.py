"""What the base weights hold at any time: W0, or W0 + delta at the entries trained in place.

A forward of the model writes the entries of all layers. `state_dict`, `load_state_dict`, disabling,
unloading and deleting an adapter, a reselection, an exception in a forward and a forward that meets
another weight in the place of one put W0 back, bit for bit. The next forward, or a backward that
needs the weights, writes again.
"""

import sys
from collections.abc import Iterable, Sequence
from itertools import accumulate
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from s2kernels import backend
from s2kernels.coupling import not_plain
from s2kernels.peft.frames import is_running
from s2kernels.peft.loaded import check_none_is_merged

if TYPE_CHECKING:
    from s2kernels.peft.spiel.entries import EntryLayer
    from s2kernels.peft.spiel.layer import SpIELLinear

# what DistributedDataParallel asks a model for
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"

# weight (N, K), entries of W0 (k,), index (k,)
Entries = tuple[Tensor, Tensor, Tensor]


class EntryWeights:
    """Keeper of the base weights of one model; its SpIEL layers and its hooks call it.

    `model` is the one that PEFT injects into, `layers` are its SpIEL layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: list[SpIELLinear] = []
        self.attached = False
        self._forward_frame: FrameType | None = None
        self._num_owners: dict[int, int] = {}
        self._inspected = 0  # id of the model at that time
        self._known: list[Tensor] = []  # the layers' weights at that time
        self._sharded = False
        self._hooks: list = []
        self._not_broadcast: list[str] = []

    def __getstate__(self) -> dict:
        # of copies and pickles: a frame is neither
        return self.__dict__ | {"_forward_frame": None}

    def attach(self, layers: Iterable["SpIELLinear"]) -> None:
        """Take charge of `layers`: all SpIEL layers of the model."""
        self.detach()
        self.layers = list(layers)
        self.inspect()
        paths = [layer.name.split(".") for layer in self.layers]
        parts = {part for path in paths for part in accumulate(path, "{}.{}".format)}
        for module in [self.model, *map(self.model.get_submodule, sorted(parts))]:
            self._hooks += [
                module.register_state_dict_pre_hook(self._on_state_dict),
                module.register_load_state_dict_pre_hook(self._on_load_state_dict),
            ]
        self._hooks += [
            self.model.register_forward_pre_hook(self._before_forward),
            self.model.register_forward_hook(self._after_forward, always_call=True),
        ]
        # DDP would copy the indices of process 0 to the others in every forward: a change, as after
        # loading, for nothing
        self._not_broadcast = [
            f"{prefix}{name}"
            for name, _ in self.model.named_buffers()
            if ".spiel_" in name
            for prefix in ("", "base_model.model.")
        ]
        ignored = getattr(self.model, _DDP_IGNORES, [])
        setattr(self.model, _DDP_IGNORES, [*ignored, *self._not_broadcast])
        self.attached = True

    def detach(self) -> None:
        """Put W0 back and remove the hooks."""
        self.restore(self.layers)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        ignored = getattr(self.model, _DDP_IGNORES, [])
        if left := [name for name in ignored if name not in self._not_broadcast]:
            setattr(self.model, _DDP_IGNORES, left)
        elif ignored:
            delattr(self.model, _DDP_IGNORES)
        self._not_broadcast = []
        self.attached = False

    @property
    def in_forward(self) -> bool:
        """Whether a forward of the model is running that has written the entries."""
        return is_running(self._forward_frame)

    def write(self, adapters: Iterable[tuple["SpIELLinear", str]]) -> None:
        """Write W0 + delta of one adapter a layer into the weights, by one launch a device."""
        adapters = list(adapters)
        others = [layer.written not in (None, name) or layer.is_moved() for layer, name in adapters]
        self.restore([layer for (layer, _), other in zip(adapters, others, strict=True) if other])
        entries = []
        for layer, name in adapters:
            if layer.displaced is None:
                base = layer.take_base_entries(name)
                layer.displaced = layer.weight, base, layer.spiel_index[name]
                layer.written = name
            entries.append(layer.displaced)
        write_entries(entries, [layer.spiel_delta[name] for layer, name in adapters])

    def restore(self, layers: Iterable["EntryLayer"]) -> None:
        """Put W0 back where entries are written, by one launch a device."""
        layers = list(layers)
        write_entries([layer.displaced for layer in layers if layer.displaced is not None], None)
        for layer in layers:
            layer.written = layer.displaced = None

    def not_inplace(self, weight: Tensor) -> str | None:
        """Why no entries of this weight can be written, as far as the rest of the model decides."""
        if self._sharded:
            return "FSDP gathers the weights anew for each forward and backward"
        owners = self._num_owners.get(id(weight), 1)
        return f"the weight is shared by {owners} modules" if owners > 1 else None

    def inspect(self) -> None:
        """Look for what forbids writing into weights."""
        self._inspected = id(self.model)
        self._known = [layer.weight for layer in self.layers]
        self._num_owners = {}
        for _, value in self.model.named_parameters(remove_duplicate=False):
            self._num_owners[id(value)] = self._num_owners.get(id(value), 0) + 1
        self._sharded = any(isinstance(module, FSDPModule) for module in self.model.modules())

    def _notice_changes(self) -> None:
        """Inspect the model again where it may be another one than it was.

        FSDP2 comes after the adapter was made, a deep copy has other parameters, and anybody may
        assign a weight. A layer whose dense weight was, and is one again, has another base now.
        """
        pairs = zip(self.layers, self._known, strict=True)
        others = [(layer, known) for layer, known in pairs if layer.weight is not known]
        if self._inspected != id(self.model) or others or not any(x.written for x in self.layers):
            self.inspect()
        for layer, known in [] if self._sharded else others:
            if not (not_plain(layer.weight) or not_plain(known)):
                layer.refresh(loaded=True)

    def _before_forward(self, module: nn.Module, args) -> None:
        if module is not self.model:
            raise RuntimeError(
                "nn.DataParallel copies the weights before the entries are written into them, and "
                "has gradients of its own for each copy: use DistributedDataParallel"
            )
        self._notice_changes()
        for layer in self.layers:
            layer.refresh()
        adapters = [(layer, layer.inplace_adapter()) for layer in self.layers]
        self.restore([layer for layer, name in adapters if name is None])
        self.write([(layer, name) for layer, name in adapters if name is not None])
        self._forward_frame = None if torch.compiler.is_compiling() else sys._getframe(1)

    def _after_forward(self, module: nn.Module, args, output) -> None:
        self._forward_frame = None
        if sys.exc_info()[0] is not None:
            self.restore(self.layers)

    def _on_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.restore(self.layers)
        self._notice_changes()
        for layer in self.layers:
            layer.renew_fingerprints()

    def _on_load_state_dict(self, module: nn.Module, *args) -> None:
        check_none_is_merged(self.layers)
        self.restore(self.layers)


def write_entries(entries: Sequence[Entries], deltas: Sequence[Tensor] | None) -> None:
    """`sparse_write` device by device: W0 + delta, or for None W0 itself."""
    devices: dict[torch.device, list[int]] = {}
    for i, (weight, _, _) in enumerate(entries):
        devices.setdefault(weight.device, []).append(i)
    for here in devices.values():
        weights, base, index = zip(*(entries[i] for i in here), strict=True)
        delta = None if deltas is None else [deltas[i] for i in here]
        backend.select(weights[0]).sparse_write(weights, base, delta, index)
