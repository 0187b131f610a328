"""What the layers of both methods are: adapters of one frozen weight, and their life."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from s2kernels.coupling import not_plain
from s2kernels.peft.host.kept_buffers import (
    KeptBuffers,
    has_values,
    home_of,
    local,
    replicated,
    with_values,
)
from s2kernels.peft.host.loading import KnownAdapters
from s2kernels.peft.host.obstacles import refuse_export
from s2kernels.peft.host.premises import Premises
from s2kernels.peft.host.sharding import check_is_dense_here, check_not_partitioned
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.peft.host.written_layer import WrittenLayer


class AdapterLayer(nn.Module, BaseTunerLayer, WrittenLayer):
    """A frozen base weight with adapters, whose names are the keys of `modes`.

    Each has a trained delta, an index of where in the weight it lies, and a fingerprint of W0
    there: an adapter is refused on another base. A fingerprint of zeros stands for "not known".
    """

    # the attributes of `deltas`, `indices` and `fingerprints`, which are saved under these names
    delta_name: str
    index_name: str
    fingerprint_name: str

    def __init__(self, keeper: WeightKeeper, name: str) -> None:
        super().__init__()
        self.keeper, self.name = keeper, name
        setattr(self, self.delta_name, nn.ParameterDict())
        setattr(self, self.index_name, KeptBuffers())
        setattr(self, self.fingerprint_name, KeptBuffers())
        self.modes: dict[str, str] = {}
        self.known = KnownAdapters(self)
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self._call: Any = None
        self.register_state_dict_post_hook(_as_saved)
        self.register_load_state_dict_post_hook(_after_load)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_call": None}  # a copy has other tensors

    @property
    def deltas(self) -> nn.ParameterDict:
        """The trained parameter of each adapter."""
        return getattr(self, self.delta_name)

    @property
    def indices(self) -> BufferDict:
        """Where in the weight each adapter's delta lies."""
        return getattr(self, self.index_name)

    @property
    def fingerprints(self) -> BufferDict:
        """Of each adapter, the fingerprint of W0 there, int64."""
        return getattr(self, self.fingerprint_name)

    # What each method says of its own layers, besides `take` and `entries`

    def obstacle(self) -> str | None:
        """Why nothing can be written into the weight, as far as the kind of the layer decides."""
        raise NotImplementedError

    def place(self, adapter: str) -> None:
        """Look up where its values lie in the weight as it is; ValueError if they do not fit."""
        raise NotImplementedError

    def fingerprint_of(self, base: Tensor) -> Tensor:
        """The fingerprint of values that `take` took, int64, shaped like the saved one."""
        raise NotImplementedError

    def check_fingerprint(self, expected: Tensor, base: Tensor) -> None:
        """Raises ValueError for values of another base than that of the fingerprint."""
        raise NotImplementedError

    def unknown_fingerprint(self, adapter: str) -> Tensor:
        """Zeros of the shape of a fingerprint."""
        raise NotImplementedError

    def prepare(self) -> Any:
        """What a forward does as things are now; see `prepared`."""
        raise NotImplementedError

    # What a forward does

    def prepared(self) -> Any:
        """`prepare`, once until something changes: the keeper's `changes`, or `premises`."""
        call, keeper = self._call, self.keeper
        if not keeper.is_up_to_date(call):
            with torch.inference_mode(False):  # views made there could not be saved for a backward
                check_is_dense_here(self.name, self.weight)
                keeper.notice_call(self)
                self.known.look()
                call = self._call = self.prepare()
                keeper.expect(call.premises)
        return call

    def active(self) -> list[str]:
        """The adapters that decide the output: none while they are disabled or merged. ValueError
        for one that cannot be used, and under torch.export for written ones.
        """
        if self.disable_adapters or self.merged:
            return []
        names = self.present(self.active_adapters)
        if any(self.modes[name] != "additive" for name in names):
            refuse_export()
        return names

    def not_inplace(self) -> str | None:
        """Why nothing can be written into the base weight; None if it can."""
        if reason := self.obstacle():
            return reason
        weight = self.weight
        return not_plain(weight) or self.keeper.obstacles.of(weight)

    def written_adapter(self) -> str | None:
        """The adapter whose values belong in the weight now; None where there is none.

        Raises ValueError where an adapter demands mode="inplace" and the weight does not admit it,
        it is not the only active one, or the weight itself is trained: it would get no gradient.
        """
        names = self.active()
        trained = self.weight.requires_grad
        if len(names) == 1 and not trained:
            if self.modes[names[0]] == "additive":
                return None
            self.check_mode(self.modes[names[0]])
            return names[0] if self.not_inplace() is None else None
        for name in names:
            if self.modes[name] == "inplace":
                wanted = "a frozen weight" if trained else "exactly one active adapter"
                raise ValueError(
                    f"adapter {name!r} of {self.name} has mode='inplace', which needs {wanted}, "
                    f"got {'a trained one' if trained else names}; use mode='auto' or 'additive'"
                )
        return None

    def operands(self, adapter: str) -> tuple[Tensor, ...] | None:
        """The weight, and the adapter's delta and index; None where the layer lacks it."""
        if adapter not in self.modes:
            return None
        return self.weight, self.deltas[adapter], self.indices[adapter]

    def note(self, premises: Premises, adapter: str | None) -> None:
        """Note what is written: the weight, and the adapter's tensors."""
        premises.same_child(self, "base_layer")
        premises.same_tensor(self.get_base_layer(), "weight")
        premises.as_trainable(self.weight)
        check_not_partitioned([self.weight])
        premises.as_partitioned(self.weight)
        if adapter is not None:
            premises.same_tensor(self.deltas, adapter)
            for buffers in (self.indices, self.fingerprints):
                premises.same_tensor(buffers, adapter)
                premises.unwritten(buffers[adapter])

    # What changes it

    def check_mode(self, mode: str) -> None:
        """Raises ValueError for a weight that accelerate keeps elsewhere, which it fetches for the
        forward of the base layer alone, and for mode="inplace" where the base layer does not admit
        it. One that is on the meta device without accelerate is loaded later.
        """
        if not self.weight.is_meta:
            if mode == "inplace" and (reason := self.not_inplace()):
                raise ValueError(f"mode='inplace' needs a plain dense weight: {reason}")
        elif hasattr(self.get_base_layer(), "_hf_hook"):
            raise ValueError(
                f"{self.name} cannot be trained: accelerate has offloaded its weight (device_map, "
                "cpu_offload, disk_offload); keep the targets on a device"
            )

    def add(
        self, adapter: str, mode: str, shape: Sequence[int], index: Tensor, dtype: Any = None
    ) -> None:
        """Have an adapter of zeros, fp32 by default, at an index that the caller has checked."""
        dtype = dtype or (torch.float64 if self.weight.dtype == torch.float64 else torch.float32)
        # On the meta device PEFT loads the tensors afterwards; then they are only declared here.
        self.deltas[adapter] = nn.Parameter(self.zeros(shape, dtype))
        self.indices[adapter] = index.to(home_of(self.weight))
        self.modes[adapter] = mode
        with with_values():
            if not index.is_meta:
                self.place(adapter)
            self.known.own(adapter, self.known.fingerprint_now(adapter))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What a new delta is, beside the weight."""
        return torch.zeros(*shape, dtype=dtype, device=self.weight.device)

    @torch.inference_mode(False)  # or it could never be trained
    def copy_adapter(self, source: str, adapter: str) -> None:
        """Have an adapter of this layer hold what another one, `source`, does; the weight holds W0.
        Raises ValueError where `source` was trained on another base.
        """
        self.known.look()
        self.known.renew()
        requires_grad = self.deltas[adapter].requires_grad
        delta = self.deltas[source].detach().clone()
        self.deltas[adapter] = nn.Parameter(delta, requires_grad=requires_grad)
        self.indices[adapter] = self.indices[source].clone()
        self.place(adapter)
        known = self.fingerprints[source]  # of the dense base, where this one is quantized
        own = known.clone() if known.any() else self.known.fingerprint_now(adapter)
        self.known.own(adapter, own)

    def locate(self) -> None:
        """`place` all adapters, since the basis has changed."""
        for name, index in self.indices.items():
            if not index.is_meta and not self.known.refused(name):
                self.place(name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        before = self.active_adapters
        super().set_adapter(adapter_names, inference_mode)
        if self.active_adapters != before:
            self.keeper.changed()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.keeper.restore([self])
        if enabled == self.disable_adapters:
            self.keeper.changed()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        self.keeper.release()  # the basis may be that of the adapter
        super().delete_adapter(adapter_name)
        self.known.forget(adapter_name)
        self.keeper.changed()

    def _apply(self, fn, recurse: bool = True):
        self.known.look()
        self.keeper.moving(self)
        before = self.weight
        empty = [name for name, delta in self.deltas.items() if delta.is_meta]
        super()._apply(fn, recurse)
        for name in empty:  # as a new adapter is; on the meta device this does nothing
            nn.init.zeros_(self.deltas[name])
        self.known.moved()
        self.keeper.moved(self, before, fn)
        return self

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """PEFT's, which would also cast the delta to the dtype of the weight."""
        to = self.weight.device if device is None else torch.device(device)
        home = to if has_values(self.weight) else home_of(self.weight)
        delta = self.deltas.get(adapter_name)
        if delta is not None and not delta.is_meta and delta.device != to:
            self.deltas[adapter_name] = nn.Parameter(delta.detach().to(to), delta.requires_grad)
        for held in self.children():
            values = held._buffers.get(adapter_name) if isinstance(held, KeptBuffers) else None
            if values is not None and not values.is_meta:
                held._buffers[adapter_name] = values.to(home)

    # Merging

    def check_merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> list[str]:
        """The adapters that `merge` would merge, in that order. ValueError for a base that is not a
        plain dense weight, and with safe_merge for a result that is not finite.
        """
        names = self.present(check_adapters_to_merge(self, adapter_names))
        if names and (reason := self.not_inplace()):
            raise ValueError(
                f"an adapter can only be merged into a plain dense weight: {reason}"
                + ("; load the base in a floating dtype to merge" if self.obstacle() else "")
            )
        self.keeper.restore([self])
        for name in names if safe_merge else []:
            merged = self.take(name).base + local(self.deltas[name].detach())
            if not torch.isfinite(merged.to(self.weight.dtype)).all():
                raise ValueError(  # PEFT's words
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: "
                    "what it gives is not finite"
                )
        return names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write base + delta into the weight, rounded once, until `unmerge` restores every bit.
        Raises as `check_merge` does, before anything changes.
        """
        for name in self.check_merge(safe_merge, adapter_names):
            self.keeper.merge(self, name)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo every `merge`, the last one first."""
        self.keeper.restore([self])
        while self.merged_adapters:
            self.keeper.unmerge(self)
            self.merged_adapters.pop()

    def present(self, names: list[str]) -> list[str]:
        """Those that the layer has. Raises ValueError for one that was refused when it came."""
        found = [name for name in names if name in self.modes]
        for name in found:
            if reason := self.known.refused(name):
                raise ValueError(f"adapter {name!r} cannot be used: {reason}")
        return found


def _as_saved(layer: AdapterLayer, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for part, buffers in layer.named_children():
        for name in buffers if isinstance(buffers, KeptBuffers) else ():
            key = f"{prefix}{part}.{name}"
            if key in state:
                state[key] = replicated(state[key], layer.deltas[name])


def _after_load(layer: AdapterLayer, incompatible_keys) -> None:
    layer.known.look(loaded=True)
