"""Notices deltas that get no gradient, such as that of Mamba's dt_proj.

A module that reads the weight of a projection without calling it gets the frozen weight, and what
is trained beside it is left out. It is known when a backward begins to give gradients a second
time: whatever has had none by then is named in a warning, once an adapter.
"""

import warnings
from functools import partial
from typing import Any

from torch import Tensor


class FirstGradients:
    """The deltas of one model that are being trained for the first time. A copy watches none."""

    def __init__(self) -> None:
        # by adapter and layer, the delta and its hook, which a first gradient leaves on
        self._watched: dict[str, dict[Any, tuple[Tensor, Any]]] = {}
        self._came: set[tuple[str, Any]] = set()
        self._told: set[str] = set()

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()  # type: ignore[misc]

    def watch(self, layer: Any) -> None:
        """The active adapters of a layer may be trained now."""
        for adapter in layer.active_adapters:
            delta, watched = layer.deltas.get(adapter), self._watched.setdefault(adapter, {})
            if delta is None or adapter in self._told or not delta.requires_grad:
                continue
            if layer not in watched or watched[layer][0] is not delta:
                hook = delta.register_hook(partial(self._arrived, adapter, layer))
                watched[layer] = delta, hook

    def forget(self, adapter: str) -> None:
        """The model does not have the adapter any more, or all is known of it."""
        for _, hook in self._watched.pop(adapter, {}).values():
            hook.remove()
        self._came = {key for key in self._came if key[0] != adapter}
        self._told.discard(adapter)

    def _arrived(self, adapter: str, layer: Any, grad: Tensor) -> None:
        if (adapter, layer) not in self._came:
            self._came.add((adapter, layer))
            return
        lost = [
            layer.name
            for layer, (delta, _) in self._watched.get(adapter, {}).items()
            if (adapter, layer) not in self._came and layer.deltas.get(adapter) is delta
        ]
        self.forget(adapter)
        self._told.add(adapter)
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            warnings.warn(
                f"adapter {adapter!r}: the deltas of {', '.join(lost[:3])}{more} got no gradient "
                "in the first backward. If a module reads their weight without calling the layer, "
                "as Mamba does with dt_proj, they never get one: exclude_modules leaves them out",
                stacklevel=2,
            )
