"""The layer that PEFT puts in the place of a Linear: how its slices reach the output."""

from typing import Any, NamedTuple

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from s2kernels.architectures import Member
from s2kernels.autograd.linear import delta_linear, linear
from s2kernels.coupling import is_conv1d, is_dense
from s2kernels.peft.host.holding import Holding, holding, keep_w0_for_backward_of
from s2kernels.peft.host.premises import Premises
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.peft.host.written_layer import Held
from s2kernels.peft.s2ft.layer import S2FTLayer
from s2kernels.peft.s2ft.mixed import Rows
from s2kernels.reference import Index, take


class LinearCall(NamedTuple):
    """What a forward of the layer does; see `AdapterLayer.prepared`.

    written:  the adapter whose slice belongs in the weight; None where the weight is to hold W0
    matrix:   the weight (N, K) that one Function takes with the first slice; None where the base
              layer computes its own output
    slices:   (delta, positions) of the active adapters
    holding:  what the backward of that Function enters
    """

    changes: int
    premises: Premises
    written: str | None
    matrix: Tensor | None
    bias: Tensor | None
    slices: list[tuple[Tensor, Index]]
    holding: Holding | None


class S2FTLinear(S2FTLayer):
    """A linear layer, `base_layer`, with trained slices of its weight (N, K); see `S2FTLayer`."""

    def __init__(
        self,
        base_layer: nn.Module,
        keeper: WeightKeeper,
        name: str,
        dim: str,
        structure: str | None = None,
        member: Member | None = None,
    ) -> None:
        super().__init__(keeper, name, dim, structure, member)
        self.base_layer = base_layer
        self.in_features, self.out_features = features(base_layer)
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
        return [(self.matrix_of(held.weight), held.base, delta, held.where, self.dim)]

    def take_base_slice(self, where: Index) -> Tensor:
        weight = self.matrix_of(self.weight).data
        return take(weight, where) if self.dim == "in" else take(weight.t(), where).t().contiguous()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to W0, dense, shaped like the weight, in the dtype of the delta."""
        delta, index = self.s2ft_delta[adapter].detach(), self.s2ft_index[adapter]
        dense = delta.new_zeros(self.out_features, self.in_features)
        return self.matrix_of(dense.index_copy_(self.axis, index.long(), delta))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def prepare(self) -> LinearCall:
        written = self.written_adapter()
        names = self.active()
        dense = bool(names) and is_dense(self.base_layer) and not self.weight.requires_grad
        premises = Premises()
        if not torch.compiler.is_compiling():
            self.note(premises, written)
            if dense:
                premises.same_tensor(self.base_layer, "bias")
                if is_conv1d(self.base_layer):  # its matrix is a view
                    premises.unmoved(self.weight)
            for name in names:
                premises.same_tensor(self.s2ft_delta, name)
                premises.same_tensor(self.s2ft_index, name)
        return LinearCall(
            self.keeper.changes,
            premises,
            written,
            self.matrix_of(self.weight) if dense else None,
            self.bias if dense else None,
            [(self.s2ft_delta[name], self.positions[name]) for name in names],
            holding(self.keeper, {self: written}) if dense else None,
        )

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The base layer's output with the active adapters: (..., N) for x (..., K)."""
        keeper = self.keeper
        if torch.compiler.is_compiling():
            return self._compute(x, self.prepare(), *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        call, rows = self.prepared(), keeper.forwards.rows
        if rows is not None and not self.disable_adapters:
            return self._forward_mixed(x, rows, *args, **kwargs)  # type: ignore[arg-type]
        if keeper.are_ready({self: call.written}):
            return self._compute(x, call, *args, **kwargs)
        with keeper.forwards.lock:
            keeper.ensure_written({self: call.written})
            return self._compute(x, call, *args, **kwargs)

    def _compute(self, x: Tensor, call: LinearCall, *args, **kwargs) -> Tensor:
        if call.matrix is None:
            y, others = self._forward_base(x, *args, **kwargs), call.slices
        else:
            (delta, where), *others = call.slices
            mode = "additive" if call.written is None else "inplace"
            y = linear(x, call.matrix, delta, where, self.dim, call.bias, mode, call.holding)
        for delta, where in others:
            y = delta_linear(y, x, delta, where, self.dim)
        return y

    def _forward_base(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        keep_w0_for_backward_of(y, self)
        return y

    def _forward_mixed(self, x: Tensor, rows: Rows, *args, **kwargs) -> Tensor:
        """Each row of the batch through its own adapter; an adapter that this layer lacks leaves
        the row as the base layer has it.
        """
        if self.merged:
            raise ValueError("adapter_names does not go with merged adapters: call unmerge_adapter")
        # in the FFNs of the coupling table, which are no experts, tokens are only ever joined
        adapter_names = rows.of(x, joined=self.structure is not None)
        self.keeper.restore([self])
        y = self._forward_base(x, *args, **kwargs)
        present = self.present(sorted(set(adapter_names)))
        parts = {name: (self.s2ft_delta[name], self.positions[name]) for name in present}
        return rows.add(y, x, self, self.dim, adapter_names, parts) if parts else y


def _not_merged() -> None:
    raise ValueError("an adapter can only be merged into a plain dense weight")


def features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, or of a Conv1D, which calls them otherwise."""
    linear: Any = layer
    return (linear.nx, linear.nf) if is_conv1d(layer) else (linear.in_features, linear.out_features)
