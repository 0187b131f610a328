"""What a backward is given: a context in which weights hold what its forward saw."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.update import WeightSlice


def holding(keeper: WeightKeeper, adapters: dict[Any, str | None]) -> "Holding | None":
    """A context in which the weights of these layers hold these adapters, or W0 for None.

    None under torch.compile, and over merged weights, which nobody writes to.
    """
    if torch.compiler.is_compiling() or any(layer.merged for layer in adapters):
        return None
    return Holding(keeper, adapters)


class Holding:
    """A context for a backward: the weights hold what the forward saw. See `holding`.

    Raises RuntimeError on entry where that cannot be had any more.
    """

    __slots__ = ("_adapters", "_changes", "_keeper", "_wanted")

    def __init__(self, keeper: WeightKeeper, adapters: dict[Any, str | None]) -> None:
        self._keeper, self._changes = keeper, keeper.changes
        self._adapters = adapters
        # for each layer its weight, the adapter's delta and index; None for W0
        self._wanted = [
            (layer, None if adapter is None else layer.operands(adapter))
            for layer, adapter in adapters.items()
        ]

    def __enter__(self) -> None:
        keeper = self._keeper
        keeper.forwards.lock.acquire()
        try:
            if keeper.changes != self._changes:
                self._check()
            for layer, wanted in self._wanted:
                now = keeper.held_by_layer.get(layer)
                if now is None and wanted is None:
                    continue
                if (
                    now is None
                    or wanted is None
                    or now.weight is not wanted[0]
                    or now.delta is not wanted[1]
                ):
                    self._check()
                    keeper.ensure_written(self._adapters)
                    break
        except BaseException:
            keeper.forwards.lock.release()
            raise

    def __exit__(self, *exc: Any) -> None:
        self._keeper.forwards.lock.release()

    @contextmanager
    def writing(self, delta: Tensor) -> Iterator[WeightSlice | None]:
        """See `s2kernels.autograd.accumulate.WeightHolder`; it has been entered. What a forward
        then has to write is nothing, until something else changes the delta.
        """
        for layer in self._adapters:
            held = self._keeper.held_by_layer.get(layer)
            if held is not None and held.delta is delta:
                ((weight, base, _, where, dim),) = layer.entries(held, None)
                held.written = None  # where this is interrupted
                yield WeightSlice(weight, base, where, dim)
                held.written = delta._version, delta.data_ptr()
                return
        yield None

    def _check(self) -> None:
        for layer, wanted in self._wanted:
            if layer.merged or not (wanted is None or self._keeper.attached):
                raise RuntimeError(
                    "the adapter was merged or unloaded between forward and backward"
                )
            if wanted is None:
                continue
            adapter = self._adapters[layer]
            now = layer.operands(adapter)
            if now is None or any(a is not b for a, b in zip(now, wanted, strict=True)):
                raise RuntimeError(
                    f"{layer.name}: the weight, or the adapter {adapter!r}, is another one than it "
                    "was in the forward"
                )


def keep_w0_for_backward_of(y: Tensor, layer: Any) -> None:
    """The backward of y, which the base layer has computed, meets W0, whatever is written until
    then.
    """
    if y.requires_grad and layer.not_inplace() is None:
        held = holding(layer.keeper, {layer: None})
        if held is not None:
            y.register_hook(lambda dy: _enter(held))


def _enter(held: Holding) -> None:
    with held:
        pass
