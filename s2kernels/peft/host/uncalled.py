"""Notices trained layers that a forward does not call, such as Mamba's dt_proj.

A module that reads the weight of a projection without calling it gets the frozen weight, and what
is trained beside it is left out. The first forward that a backward may follow shows it.
"""

import warnings
from typing import Any

import torch
from torch import nn


class FirstForward:
    """A forward hook on a tuner and on its model, of which PEFT calls one, until it has seen that.

    Warns of the trained layers that were not called.
    """

    def __init__(self, keeper: Any, *modules: nn.Module) -> None:
        self._keeper = keeper
        self._handles = [module.register_forward_hook(self) for module in modules]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        trained = [layer for layer in self._keeper.layers if _is_trained(layer)]
        if not trained:
            return
        self.remove()
        if lost := [layer.name for layer in trained if layer not in self._keeper.called]:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            warnings.warn(
                f"{', '.join(lost[:3])}{more}: trained, but not called in the first forward. If a "
                "module reads their weight instead, as Mamba does with dt_proj, they never get a "
                "gradient: exclude_modules leaves them out",
                stacklevel=2,
            )

    def remove(self) -> None:
        """Take it off."""
        for handle in self._handles:
            handle.remove()


def _is_trained(layer: Any) -> bool:
    deltas = (layer.deltas[name] for name in layer.active_adapters if name in layer.deltas)
    return not layer.disable_adapters and any(delta.requires_grad for delta in deltas)
