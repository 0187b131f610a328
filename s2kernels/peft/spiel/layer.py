"""The layer that PEFT puts in the place of a Linear: its trained entries, and its forward."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s2kernels import backend
from s2kernels.adapter import alike, fingerprint
from s2kernels.autograd.sparse import Observer, Weight, check_entries, linear
from s2kernels.peft.host.holding import Holding, holding, keep_w0_for_backward_of
from s2kernels.peft.host.kept_buffers import KeptBuffers, beside, has_values, with_values
from s2kernels.peft.host.linear import AdapterLinear
from s2kernels.peft.host.premises import Premises
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.peft.host.written_layer import Held
from s2kernels.peft.spiel.dequantize import check_order, is_quantized, keeping_order, panels_of
from s2kernels.peft.spiel.replace import Replacement
from s2kernels.plan import TilePlan, rows_and_columns, tile_plan


def sparse_writer(entries: list[tuple]) -> Callable[[], None]:
    """What writes the entries of layers, all on one device and all with or without delta."""
    weights, base, deltas, index = zip(*entries, strict=True)
    write = backend.select(weights[0]).sparse_write
    return partial(write, weights, base, None if deltas[0] is None else deltas, index)


class EntriesCall(NamedTuple):
    """What a forward of the layer does; see `AdapterLayer.prepared`.

    written: of this layer, the adapter whose entries are to be in the weight; None for W0. adapter:
    the one that is active, None for the base alone. weight: None where the base layer is quantized.
    """

    changes: int
    premises: Premises
    written: dict[Any, str | None]
    adapter: str | None
    mode: str
    weight: Tensor | None
    bias: Tensor | None
    holding: Holding | None


class SpIELLinear(AdapterLinear):
    """A frozen linear layer, weight (N, K), with k trained entries per adapter.

    Saved per adapter:

        spiel_delta        Parameter (k,), fp32 by default
        spiel_index        (k,) positions row * K + column, ascending: see `index_dtype`
        spiel_fingerprint  int64 (1,), of W0 there: an adapter is refused on another base. 0, for
                           "not known", where the weight is quantized

    `name` is that of the layer in the model. `observers` are called in backward: see
    `s2kernels.autograd.sparse_linear`.
    """

    spiel_delta: nn.ParameterDict
    spiel_index: KeptBuffers
    spiel_fingerprint: KeptBuffers
    delta_name, index_name = "spiel_delta", "spiel_index"
    fingerprint_name = "spiel_fingerprint"
    adapter_layer_names = ("spiel_delta",)
    other_param_names = ("spiel_index", "spiel_fingerprint", "modes", "observers", "_plans")

    def __init__(self, base_layer: Any, keeper: WeightKeeper, name: str) -> None:
        super().__init__(keeper, name)
        self.base_layer = base_layer
        self.in_features: int = base_layer.in_features
        self.out_features: int = base_layer.out_features
        self.observers: dict[str, Observer] = {}
        self._plans: dict[str, TilePlan] = {}

    @torch.inference_mode(False)  # or they could never be trained
    def update_layer(
        self, adapter_name: str, index: Tensor, mode: str, dtype: torch.dtype | None
    ) -> None:
        """Add an adapter that trains the entries at `index` (k,), sorted, deltas in dtype.

        Raises ValueError as `check_mode` does, and for a 4-bit weight that bitsandbytes has
        rearranged.
        """
        check_order(self.get_base_layer())
        self.check_mode(mode)
        with with_values():
            num = check_entries("index", index, self.shape)
        self.add(adapter_name, mode, (num,), index, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight, which a quantized one does not have."""
        return self.out_features, self.in_features

    def obstacle(self) -> str | None:
        base = self.get_base_layer()
        if type(base) is not nn.Linear:
            return f"the base layer is a {type(base).__name__}"
        if not self.weight.is_contiguous():
            return f"the weight is not contiguous, its stride is {self.weight.stride()}"
        return None

    def take(self, adapter: str) -> Held:
        index = self.spiel_index[adapter]
        base = self.weight.data[rows_and_columns(index, self.in_features)]
        return Held(adapter, self.weight, index, base, self.spiel_delta[adapter])

    def entries(self, held: Held, delta: Tensor | None) -> list[tuple]:
        return [(held.weight, held.base, delta, held.where)]

    def place(self, adapter: str) -> None:
        self._plans.pop(adapter, None)
        what = f"{self.name}: spiel_index of adapter {adapter!r}"
        num = check_entries(what, self.spiel_index[adapter], self.shape)
        if num != len(self.spiel_delta[adapter]):
            raise ValueError(
                f"{what} must have the {len(self.spiel_delta[adapter])} entries of spiel_delta, "
                f"got {num}"
            )

    def fingerprint_of(self, base: Tensor) -> Tensor:
        return fingerprint(base[None], "out")

    def check_fingerprint(self, expected: Tensor, base: Tensor) -> None:
        if not alike(self.fingerprint_of(base), expected.cpu()).all():
            raise ValueError(
                f"{self.name}: the adapter was trained on another base: what the weight holds at "
                f"its {len(base)} trained entries is not as it was; load the base that it was "
                "trained on"
            )

    def unknown_fingerprint(self, adapter: str) -> Tensor:
        return torch.zeros(1, dtype=torch.int64, device=self.spiel_index[adapter].device)

    def active(self) -> list[str]:
        """See `AdapterLayer.active`. Raises ValueError for several at once."""
        names = super().active()
        if len(names) > 1:
            raise ValueError(f"one SpIEL adapter can be active at a time, got {names}")
        return names

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to W0, dense (N, K), in the dtype of the delta."""
        delta, index = self.spiel_delta[adapter].detach(), self.spiel_index[adapter]
        dense = delta.new_zeros(self.out_features * self.in_features)
        return dense.index_copy_(0, index.long(), delta).view(self.shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def prepare(self) -> EntriesCall:
        written, premises = {self: self.written_adapter()}, Premises()
        name = next(iter(self.active()), None)
        mode = "additive" if written[self] is None else "inplace"
        weight = None if is_quantized(self.get_base_layer()) else self.weight
        if not torch.compiler.is_compiling():
            self.note(premises, name)
            premises.same_tensor(self.get_base_layer(), "bias")
        changes, held = self.keeper.changes, holding(self.keeper, written)
        return EntriesCall(changes, premises, written, name, mode, weight, self.bias, held)

    def compute(self, x: Tensor, call: EntriesCall, *args, **kwargs) -> Tensor:
        name = call.adapter
        if name is None:
            with keeping_order(self.get_base_layer()):
                y = self.base_layer(x, *args, **kwargs)
            keep_w0_for_backward_of(y, self)
            return y
        delta, index, plan = self.spiel_delta[name], self.spiel_index[name], self._plans.get(name)
        if not has_values(x):  # and there is no backward
            index, plan = beside(index, x), None
        elif plan is None and torch.is_grad_enabled() and delta.requires_grad:
            plan = self._plans[name] = tile_plan(index, self.shape)
        weight: Weight | None = call.weight
        if weight is None:
            weight = panels_of(self.get_base_layer())
        observe = self.observers.get(name)
        return linear(
            x, weight, delta, index, call.bias, call.mode, plan, call.holding, observe=observe
        )

    @torch.no_grad()
    def replace(self, adapter_name: str, replaced: Replacement) -> None:
        """Train other entries from now on: the delta of grown ones is 0, gradients move along.

        The weight must hold W0. States of an optimizer are the caller's.
        """
        delta = self.spiel_delta[adapter_name]
        replaced.apply_(delta)
        if delta.grad is not None:
            replaced.apply_(delta.grad)
        self.spiel_index[adapter_name].copy_(replaced.index)
        check_entries(f"{self.name}: index", self.spiel_index[adapter_name], self.shape)
        self._plans.pop(adapter_name, None)
        self.known.own(adapter_name)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._plans = {}
        return self

    def extra_repr(self) -> str:
        return f"entries={ {name: len(index) for name, index in self.spiel_index.items()} }"
