"""The layer that PEFT puts in the place of a Linear: how its slices reach the output."""

from typing import TYPE_CHECKING, Any

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from s2kernels.architectures import Member
from s2kernels.autograd.linear import delta_linear, linear
from s2kernels.coupling import is_conv1d, is_dense
from s2kernels.peft.layer import S2FTLayer
from s2kernels.reference import take

if TYPE_CHECKING:
    from s2kernels.peft.base_weights import BaseWeights


class S2FTLinear(S2FTLayer):
    """A linear layer, `base_layer`, with trained slices of its weight (N, K); see `S2FTLayer`."""

    def __init__(
        self,
        base_layer: nn.Module,
        base_weights: "BaseWeights",
        name: str,
        dim: str,
        structure: str | None = None,
        member: Member | None = None,
    ) -> None:
        super().__init__(base_weights, name, dim, structure, member)
        self.base_layer = base_layer
        self.in_features, self.out_features = features(base_layer)
        # torchao's wants to know how to quantize anew what was merged, and nothing ever is
        self.quantization_backend = resolve_quantization_backend(
            base_layer, get_apply_tensor_subclass=_not_merged
        )

    @property
    def matrix(self) -> Tensor:
        """The weight as (N, K), a view of it where the base layer stores the transpose."""
        return self.weight.t() if is_conv1d(self.get_base_layer()) else self.weight

    def obstacle(self) -> str | None:
        base = self.get_base_layer()
        return None if is_dense(base) else f"the base layer is a {type(base).__name__}"

    def entries(self, adapter_name: str, delta: Tensor | None) -> list[tuple]:
        return [(self.matrix, self.base_slice, delta, self.positions[adapter_name], self.dim)]

    def take_base_slice(self, adapter_name: str) -> Tensor:
        weight = self.matrix.data
        where = self.positions[adapter_name]
        return take(weight, where) if self.dim == "in" else take(weight.t(), where).t().contiguous()

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The base layer's output with the active adapters: (..., N) for x (..., K)."""
        self.refresh()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.base_weights.adapter_names is not None and not self.disable_adapters:
            return self._forward_mixed(x, self.base_weights.adapter_names, *args, **kwargs)
        name = self.inplace_adapter()
        if name is not None:
            return self._forward_inplace(x, name)

        self.restore()
        names = [] if self.disable_adapters or self.merged else self._present(self.active_adapters)
        if names and is_dense(self.base_layer):
            first, *names = names
            delta, where = self.s2ft_delta[first], self.positions[first]
            before_dx = self.before_dx(None)
            y = linear(
                x, self.matrix, delta, where, self.dim, self.bias, "additive", before_dx=before_dx
            )
        else:
            y = self._forward_base(x, *args, **kwargs)
        for name in names:
            y = delta_linear(y, x, self.s2ft_delta[name], self.positions[name], self.dim)
        return y

    def _forward_inplace(self, x: Tensor, name: str) -> Tensor:
        self.base_weights.write_before([self], name)
        before_dx = self.before_dx(name)
        delta, where = self.s2ft_delta[name], self.positions[name]
        return linear(
            x, self.matrix, delta, where, self.dim, self.bias, "inplace", before_dx=before_dx
        )

    def _forward_base(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        self.put_back_before_backward_of(y)
        return y

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args, **kwargs) -> Tensor:
        """Row i of the batch through adapter_names[i]; "__base__", or an adapter that this layer
        lacks, leaves the row as the base layer has it.
        """
        if self.merged:
            raise ValueError("adapter_names does not go with merged adapters: call unmerge_adapter")
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names must name an adapter for each of the {len(x)} rows of the batch, "
                f"got {len(adapter_names)}"
            )
        self.restore()
        y = self._forward_base(x, *args, **kwargs)
        for name in self._present(sorted(set(adapter_names))):
            rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
            index = torch.tensor(rows, device=x.device)
            delta, where = self.s2ft_delta[name], self.positions[name]
            part = delta_linear(y[index], x[index], delta, where, self.dim)
            y = y.index_copy(0, index, part)
        return y


def _not_merged() -> None:
    raise ValueError("an adapter can only be merged into a plain dense weight")


def features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, or of a Conv1D, which calls them otherwise."""
    linear: Any = layer
    return (linear.nx, linear.nf) if is_conv1d(layer) else (linear.in_features, linear.out_features)
