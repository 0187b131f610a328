"""The layer that PEFT puts in the place of a Linear: how its deltas reach the output."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from s2kernels.autograd.sparse import Weight, linear
from s2kernels.peft.loaded import changed, moved
from s2kernels.peft.spiel.dequantize import is_quantized, keeping_order, panels_of
from s2kernels.peft.spiel.entries import EntryLayer
from s2kernels.peft.spiel.weights import write_entries
from s2kernels.plan import tile_plan


class SpIELLinear(EntryLayer):
    """A frozen linear layer, weight (N, K), with k trained entries per adapter: see `EntryLayer`.

    `observers` are called in backward: see `s2kernels.autograd.sparse_linear`.
    """

    def active(self) -> str | None:
        """The adapter that the output is to have; None for the base alone.

        Raises ValueError for several at once.
        """
        if self.disable_adapters or self.merged:
            return None
        names = self._present(self.active_adapters)
        if len(names) > 1:
            raise ValueError(f"one SpIEL adapter can be active at a time, got {names}")
        return names[0] if names else None

    def inplace_adapter(self) -> str | None:
        """The adapter whose entries belong in the weight now; None where there is none."""
        name = self.active()
        if name is None or self.modes[name] == "additive":
            return None
        return name if self.modes[name] == "inplace" or self.not_inplace() is None else None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The base layer's output with the active adapter: (..., N) for x (..., K)."""
        self.refresh()
        if self.disable_adapters and self.merged:
            self.unmerge()
        name = self.active()
        if name is None:
            self.restore()
            with keeping_order(self.get_base_layer()):
                y = self.base_layer(x, *args, **kwargs)
            before_dx = self.before_dx(None)
            if y.requires_grad and before_dx is not None and not self.merged:
                y.register_hook(lambda dy: before_dx())
            return y
        if self.inplace_adapter() is None:
            self.restore()
            base = self.get_base_layer()
            weight = panels_of(base) if is_quantized(base) else self.weight
            return self._linear(x, name, weight, "additive", self.before_dx(None))
        # A forward of the whole model has written all entries by one launch. What comes from
        # elsewhere (a recomputed checkpoint, a call of a submodule) writes its own.
        if self.written != name or not self.weights.in_forward:
            self.weights.write([(self, name)])
        return self._linear(x, name, self.weight, "inplace", self.before_dx(name))

    def _linear(
        self,
        x: Tensor,
        name: str,
        weight: Weight,
        mode: str,
        before_dx: Callable[[], None] | None,
    ) -> Tensor:
        delta, index = self.spiel_delta[name], self.spiel_index[name]
        if name not in self._plans and torch.is_grad_enabled() and delta.requires_grad:
            self._plans[name] = tile_plan(index, self.shape)
        return linear(
            *(x, weight, delta, index, self.bias, mode, self._plans.get(name), before_dx),
            observe=self.observers.get(name),
        )

    def before_dx(self, name: str | None) -> Callable[[], None] | None:
        """What a backward is to call before it reads the weight, so that it meets what the forward
        saw there: the entries of the adapter `name`, or W0 alone for None.
        """
        if torch.compiler.is_compiling():
            return None
        return partial(self._before_dx, name, self._operands(name))

    def _operands(self, name: str | None) -> tuple[Tensor, ...]:
        """What the weight is made of with the entries of that adapter; nothing without one."""
        if name is None or name not in self.spiel_delta:
            return ()
        return self.weight, self.spiel_delta[name], self.spiel_index[name]

    def _before_dx(self, name: str | None, operands: tuple[Tensor, ...]) -> None:
        """Raises RuntimeError where what the forward saw cannot be put back any more."""
        if self.merged or not (name is None or self.weights.attached):
            raise RuntimeError("the adapter was merged or unloaded between forward and backward")
        if name is None:
            self.restore()
            return
        # by identity: autograd notices what is written into them
        if list(map(id, operands)) != list(map(id, self._operands(name))):
            raise RuntimeError(
                f"{self.name}: the weight, or the adapter {name!r}, is another one than it was in "
                "the forward"
            )
        if self.written != name:
            self.weights.write([(self, name)])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write base + delta into the weight, rounded once, until `unmerge` restores every bit.

        Raises as `check_merge` does, before anything changes.
        """
        for name in self.check_merge(safe_merge, adapter_names):
            before = self.weight, self.take_base_entries(name), self.spiel_index[name].clone()
            write_entries([before], [self.spiel_delta[name]])
            self._merged_entries.append(before)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo every `merge`, the last one first: the weight is what it was, bit for bit."""
        self.restore()
        while self.merged_adapters:
            write_entries([self._merged_entries.pop()], None)
            self.merged_adapters.pop()

    def delete_adapter(self, adapter_name: str) -> None:
        self.restore()
        super().delete_adapter(adapter_name)

    def _apply(self, fn, recurse: bool = True):
        found = changed(self.spiel_index, self.spiel_fingerprint, self._seen, loaded=False)
        if self.is_moved():
            self.restore()
        before = self.weight
        super()._apply(fn, recurse)
        if self.displaced is not None:
            index = self.spiel_index[str(self.written)]
            self.displaced = self.weight, fn(self.displaced[1]), index
        self._merged_entries = [
            (self.weight, fn(base), fn(index)) if weight is before else (weight, base, index)
            for weight, base, index in self._merged_entries
        ]
        self._plans = {}
        self._seen = moved(self.spiel_index, self.spiel_fingerprint, self._seen, found)
        return self

    def extra_repr(self) -> str:
        return f"entries={ {name: len(index) for name, index in self.spiel_index.items()} }"
