"""The layer that PEFT puts in the place of a Linear: how its slices reach the output."""

from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor

from s2kernels.autograd.accumulate import WeightHolder
from s2kernels.autograd.first_order import apply
from s2kernels.autograd.linear import S2LinearFunction, delta_linear, operands
from s2kernels.coupling import is_conv1d, is_dense
from s2kernels.peft.host.holding import holding, keep_w0_for_backward_of
from s2kernels.peft.host.kept_buffers import local
from s2kernels.peft.host.linear import AdapterLinear
from s2kernels.peft.host.premises import Premises
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.peft.host.written_layer import Held
from s2kernels.peft.s2ft.gathered import AsGathered, Gathered
from s2kernels.peft.s2ft.layer import Found, PreparedCall, S2FTLayer
from s2kernels.peft.s2ft.mixed import Rows


class S2FTLinear(S2FTLayer, AdapterLinear):
    """A linear layer, `base_layer`, with trained slices of its weight (N, K); see `S2FTLayer`.

    gathered: where FSDP gathers the weight with a slice in it, which one; see `fsdp_placement`.
    """

    gathered: Gathered | None = None

    def __init__(self, base_layer: Any, keeper: WeightKeeper, name: str, found: Found) -> None:
        super().__init__(keeper, name, found)
        self.base_layer = base_layer
        names = ("nx", "nf") if is_conv1d(base_layer) else ("in_features", "out_features")
        self.in_features, self.out_features = (getattr(base_layer, name) for name in names)
        # torchao's wants to know how to quantize anew what was merged, and nothing ever is
        self.quantization_backend = resolve_quantization_backend(
            base_layer, get_apply_tensor_subclass=_not_merged
        )

    def matrix_of(self, weight: Tensor) -> Tensor:
        """The weight as (N, K), a view of it where the base layer stores the transpose."""
        return weight.t() if is_conv1d(self.get_base_layer()) else weight

    def obstacle(self) -> str | None:
        base = self.get_base_layer()
        return None if is_dense(base) else f"the base layer is a {type(base).__name__}"

    def entries(self, held: Held, delta: Tensor | None) -> list[tuple]:
        delta = None if delta is None else local(delta)
        return [(self.matrix_of(held.weight), held.base, delta, held.where, self.dim)]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to W0, dense, shaped like the weight, in the dtype of the delta."""
        delta, index = self.s2ft_delta[adapter].detach(), self.s2ft_index[adapter]
        dense = delta.new_zeros(self.out_features, self.in_features)
        return self.matrix_of(dense.index_copy_(self.axis, index.long(), delta))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def written_adapter(self) -> str | None:
        return super().written_adapter() if self.gathered is None else None

    def arrived_adapter(self) -> str | None:
        """The adapter whose slice FSDP has put into the weight; None for W0. See `Gathered`."""
        return None if self.gathered is None else self.gathered.arrived()

    def note(self, premises: Premises, adapter: str | None) -> None:
        super().note(premises, adapter)
        premises.same_tensor(self.base_layer, "bias")
        if is_conv1d(self.base_layer):  # its matrix is a view
            premises.unmoved(self.weight)
        if self.gathered is not None:
            premises.same_attribute(self.gathered, "adapter")

    def prepare(self) -> PreparedCall:
        written, arrived = self.written_adapter(), self.arrived_adapter()
        slices, premises, given = self.active_slices(), self.premises(written), None
        if slices and is_dense(self.base_layer) and not self.weight.requires_grad:
            mode = "additive" if written is None and arrived is None else "inplace"
            matrix, held = self.matrix_of(self.weight), holding_for({self: written})
            given = operands(matrix, *slices.pop(0), self.dim, self.bias, mode, held)
        return PreparedCall(self.keeper.changes, premises, {self: written}, given, slices)

    def compute(self, x: Tensor, call: PreparedCall, *args, **kwargs) -> Tensor:
        if call.operands is None:
            y = self._forward_base(x, *args, **kwargs)
        else:
            y = apply(S2LinearFunction, x, *call.operands)
        for delta, where in call.slices:
            y = delta_linear(y, x, delta, where, self.dim)
        return y

    def _forward_base(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        keep_w0_for_backward_of(y, self)
        return y

    def compute_mixed(self, x: Tensor, rows: Rows, *args, **kwargs) -> Tensor:
        """Each row of the batch through its own adapter, the base alone where that is not here."""
        if self.merged:
            raise ValueError("adapter_names does not go with merged adapters: call unmerge_adapter")
        if self.gathered is not None:
            self.gathered.check(None)
        # in the FFNs of the coupling table, which are no experts, tokens are only ever joined
        adapter_names = rows.of(x, joined=self.structure is not None)
        self.keeper.restore([self])
        y = self._forward_base(x, *args, **kwargs)
        present = self.present(sorted(set(adapter_names)))
        parts = {name: (self.s2ft_delta[name], self.positions[name]) for name in present}
        return rows.add(y, x, self, self.dim, adapter_names, parts) if parts else y


def holding_for(written: dict[S2FTLinear, str | None]) -> WeightHolder | None:
    """A context for a backward: the weights of these layers, of one model, hold what its forward
    saw. See `holding` and `AsGathered`.
    """
    gathered = {layer.gathered: layer.gathered.adapter for layer in written if layer.gathered}
    if gathered:
        return None if torch.compiler.is_compiling() else AsGathered(gathered)
    return holding(next(iter(written)).keeper, dict(written))


def _not_merged() -> None:
    raise ValueError("an adapter can only be merged into a plain dense weight")
