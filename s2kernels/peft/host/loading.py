"""What a layer knows of its adapters: which were loaded since the last look, which it refuses."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2kernels.adapter import PREFIX
from s2kernels.autograd.checks import version_of
from s2kernels.coupling import not_plain
from s2kernels.digests import check_digests
from s2kernels.peft.host.kept_buffers import has_values


@dataclass
class _Known:
    """Of one adapter: its index and fingerprint with their versions, when they were looked at.

    unknown: the fingerprint is 0 until somebody asks for the state_dict. refused: why the adapter
    cannot be used.
    """

    seen: list[tuple[Tensor, int]]
    unknown: bool = False
    refused: str | None = None

    def __getstate__(self) -> dict:  # a copy of a tensor counts its versions anew
        return vars(self) | {"seen": [(x, version_of(x) == version) for x, version in self.seen]}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.seen = [(x, version_of(x) if is_current else -1) for x, is_current in self.seen]


class KnownAdapters:
    """The adapters of one `AdapterLayer`, as they were when they were last looked at."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._known: dict[str, _Known] = {}

    def own(self, adapter: str, fingerprint: Tensor | None = None) -> None:
        """The adapter is what this layer has made of it. fingerprint: of W0 there; None where it is
        to be computed when it is asked for.
        """
        layer, unknown = self._layer, fingerprint is None
        layer.fingerprints[adapter] = (
            layer.unknown_fingerprint(adapter) if fingerprint is None else fingerprint
        )
        self._known[adapter] = _Known(self._sources(adapter), unknown)
        layer.keeper.changed()

    def forget(self, adapter: str) -> None:
        """The layer does not have the adapter any more."""
        self._known.pop(adapter, None)

    def refused(self, adapter: str) -> str | None:
        """Why an adapter that was loaded cannot be used; None where it can."""
        known = self._known.get(adapter)
        return None if known is None else known.refused

    def fingerprint_now(self, adapter: str) -> Tensor | None:
        """The fingerprint of what the weight, which holds W0, has where the adapter lies: zeros
        where that can never be read, None where it cannot now, since another adapter is merged.
        """
        layer = self._layer
        if layer.merged:
            return None
        if not_plain(layer.weight) or not has_values(layer.weight):
            return layer.unknown_fingerprint(adapter)
        return layer.fingerprint_of(layer.take(adapter).base).to(layer.weight.device)

    @torch.inference_mode(False)
    def look(self, loaded: bool = False) -> None:
        """Take note of adapters that were loaded since the last time.

        loaded: the base may have been loaded, too. Adapters that did not come along are from then
        on those of the new base.

        One that does not fit the layer, or was trained on another base, is refused: whoever uses it
        gets a ValueError, as does, with loaded, who has loaded it.
        """
        if torch.compiler.is_compiling():
            return
        layer, faults = self._layer, []
        found = {name: same for name in layer.indices if not all(same := self._same(name, loaded))}
        if not found:
            return
        layer.keeper.restore([layer])
        for name, (_, is_own) in found.items():  # whether its fingerprint did not come along
            if layer.indices[name].is_meta:
                continue
            before = self.refused(name)
            try:
                if not (loaded or is_own):
                    self._check_digests(name)
                self._take_note(name, is_own and before is None)
            except ValueError as error:
                self._known[name] = _Known(self._sources(name), refused=str(error))
                if not (is_own and before):
                    faults.append(error)
        layer.keeper.changed()
        if loaded and faults:
            raise faults[0]

    def _same(self, adapter: str, loaded: bool) -> tuple[bool, bool]:
        known = self._known.get(adapter)
        if known is None:
            return False, False
        pairs = zip(known.seen, self._sources(adapter), strict=True)
        index, fingerprint = (old[0] is new[0] and old[1] == new[1] for old, new in pairs)
        return index and not loaded, fingerprint

    def _take_note(self, name: str, is_own: bool) -> None:
        layer = self._layer
        layer.place(name)
        expected = layer.fingerprints[name]
        if is_own or not expected.any():  # the fingerprint did not come along
            self.own(name)
            return
        plain = not layer.merged and not_plain(layer.weight) is None
        if plain:
            layer.check_fingerprint(expected, layer.take(name).base)
        known = self._known.get(name)
        unknown = known is not None and known.unknown and not plain
        self._known[name] = _Known(self._sources(name), unknown)

    def _check_digests(self, adapter: str) -> None:
        """Raises ValueError for tensors that do not have their digests, where these are still to be
        checked: transformers' `load_adapter` puts tensors here without asking PEFT.
        """
        layer, config = self._layer, self._layer.keeper.configs.get(adapter)
        given = config.digests if config is not None and config.digests else {}
        parts = {f"{layer.name}.{part}": held for part, held in layer.named_children()}
        own = {key: parts.get(key.removeprefix(PREFIX)) for key in given}
        tensors = {key: held[adapter] for key, held in own.items() if held is not None}
        if tensors:
            config.digests = {key: given[key] for key in given if key not in tensors}
            check_digests(f"the adapter {adapter!r}", {key: given[key] for key in tensors}, tensors)

    def moved(self) -> None:
        """The layer's buffers were moved, or cast, right after a `look`."""
        for name, known in self._known.items():
            known.seen = self._sources(name)

    @torch.inference_mode(False)
    def renew(self) -> None:
        """Compute the fingerprints that are not known; the weight holds W0."""
        for name, known in list(self._known.items()):
            if known.unknown and not self._layer.merged:
                self.own(name, self.fingerprint_now(name))

    def _sources(self, adapter: str) -> list[tuple[Tensor, int]]:
        buffers = self._layer.indices[adapter], self._layer.fingerprints[adapter]
        return [(buffer, version_of(buffer)) for buffer in buffers]
