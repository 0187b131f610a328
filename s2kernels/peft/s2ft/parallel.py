"""A linear layer that a tp_plan of transformers has split, and the slice that each process trains.

A plan splits a weight W (N, K) along the axis on which the channels of its slice lie: that of a
colwise layer by rows, which are its output channels, that of a rowwise one by columns. So each
process r holds whole channels, and trains those that lie in its part W_r:

    colwise, dim="out"   y_r = x W_rᵀ                  dx = sum over r of dy_r W_r
    rowwise, dim="in"    y = sum over r of x_r W_rᵀ    dx_r = dy W_r

The sums are those of the model without an adapter, and nothing else is exchanged. Index and
fingerprint are those of all channels, the same everywhere. Delta is a DTensor that is sharded along
its channels: in the order of the index, process r has the r-th part.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.utils.integrations import skip_init_on_device
from torch import Tensor, nn
from torch.distributed import tensor as distributed
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ColwiseParallel,
    RowwiseParallel,
    replace_layer_number_by_wildcard,
)

from s2kernels.peft.host.premises import Premises
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.peft.s2ft.config import S2FTConfig
from s2kernels.peft.s2ft.layer import Found, PreparedCall
from s2kernels.peft.s2ft.linear import S2FTLinear


def check_parallel(config: S2FTConfig) -> None:
    """Raises ValueError for what an adapter cannot have in a model that a tp_plan has split."""
    if config.layout == "permute":
        raise ValueError(
            "layout='permute' does not go with tensor parallelism: use layout='gather'"
        )
    if config.modules_to_save:
        raise ValueError(
            "tensor parallelism has no place for modules that are trained whole: leave out "
            f"modules_to_save, got {sorted(config.modules_to_save)}"
        )


class ParallelLinear(S2FTLinear):
    """An S2FTLinear whose `weight` is the part that this process holds; see the module.

    Raises ValueError for a layer that is not split along the axis of its channels.
    """

    def __init__(self, base_layer: Any, keeper: WeightKeeper, name: str, found: Found) -> None:
        super().__init__(base_layer, keeper, name, found)
        wanted = "rowwise" if self.dim == "in" else "colwise"
        kind = RowwiseParallel if self.dim == "in" else ColwiseParallel
        model: Any = keeper.model
        planned = model.tp_plan.get(replace_layer_number_by_wildcard(name))
        style = ALL_PARALLEL_STYLES[planned] if planned is not None else None
        weight = base_layer.weight
        if not (
            isinstance(style, kind)
            and type(base_layer) is nn.Linear
            and isinstance(weight, DTensor)
            and weight.is_floating_point()
            and weight.placements == (Shard(self.axis),)
        ):
            raise ValueError(
                f"{name} cannot be trained under tensor parallelism: a torch.nn.Linear that the "
                f"tp_plan makes {wanted} is needed for its {self.dim}put channels, got a "
                f"{type(base_layer).__name__} that it makes {planned}; name other target_modules"
            )
        self.mesh = weight.device_mesh
        self.num_shards, self.rank = self.mesh.size(), self.mesh.get_local_rank()
        # the exchanges around the layer, and what they ask for its sizes, which is no child of it
        sizes = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        self._style: tuple[Any, nn.Linear] = style, sizes

    @property
    def weight(self) -> Tensor:
        """The part (N_r, K) or (N, K_r) of this process, in the memory of the DTensor."""
        whole: Any = self.get_base_layer().weight
        part, value = vars(self).get("_part", (None, None))
        if part is not whole._local_tensor:
            part = whole._local_tensor
            value = nn.Parameter(part, requires_grad=False)
            vars(self)["_part"] = part, value  # as an attribute it would be saved, too
        return value.requires_grad_(whole.requires_grad)

    def obstacle(self) -> str | None:
        return self.keeper.obstacles.of(self.get_base_layer().weight)  # type: ignore[arg-type]

    # What is of all channels, and what of those here

    def _check_index(self, name: str, index: Tensor) -> int:
        num, shards = super()._check_index(name, index), self.num_shards
        owners = index.long() // self._width
        counts = torch.bincount(owners, minlength=shards)
        balanced = torch.arange(shards, device=index.device).repeat_interleave(num // shards)
        if not torch.equal(owners, balanced):
            raise ValueError(
                f"{self.name}: {name} must name equally many channels of each of the {shards} "
                f"parts of {self._width} into which tensor parallelism splits the layer, those of "
                f"the first part first; got {counts.tolist()}"
            )
        return num

    @property
    def _width(self) -> int:
        """Channels of the largest part, which is that of all processes but the last ones."""
        return -(-self.num_channels // self.num_shards)

    def working(self, index: Tensor) -> Tensor:
        return self._of_this_process(index) - self.rank * self._width

    def _of_this_process(self, values: Tensor) -> Tensor:
        """Of values (R,) of all channels, those of the channels here."""
        return values.chunk(self.num_shards)[self.rank]

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        parts = [Shard(self.axis)]
        return distributed.zeros(*shape, dtype=dtype, device_mesh=self.mesh, placements=parts)

    # PEFT cannot leave a DTensor on the meta device, as low_cpu_mem_usage has it
    add = skip_init_on_device(S2FTLinear.add)

    def fingerprint_of(self, base: Tensor) -> Tensor:
        return self._gather(super().fingerprint_of(base))

    def check_fingerprint(self, expected: Tensor, base: Tensor) -> None:
        """Raises ValueError on all processes where that of one differs."""
        error = None
        try:
            super().check_fingerprint(self._of_this_process(expected), base)
        except ValueError as caught:
            error = caught
        if self._gather(torch.tensor([error is not None])).any() and error is None:
            error = ValueError(f"{self.name}: the adapter was trained on another base")
        if error is not None:
            raise error

    def _gather(self, values: Tensor) -> Tensor:
        """The values of all processes, one after the other."""
        values = values.to(self.mesh.device_type)
        return DTensor.from_local(values, self.mesh, [Shard(0)], run_check=False).full_tensor()

    def receive(self, adapter: str, index: Tensor, delta: Tensor) -> Tensor:
        """The delta of an adapter as it comes from a file, whole, as one of this layer, which is
        made anew where it trains another number of channels. The index has been checked.
        """
        if index.shape != self.s2ft_index[adapter].shape:
            trained = self.s2ft_delta[adapter].requires_grad
            settings = self.modes[adapter], self.layouts[adapter], self.fuse[adapter]
            self.update_layer(adapter, index, *settings)
            self.s2ft_delta[adapter].requires_grad_(trained)
        if isinstance(delta, DTensor):
            return delta
        delta = delta.to(self.weight.device)
        return distribute_tensor(delta, self.mesh, [Shard(self.axis)], src_data_rank=None)

    # What is computed with the part

    def note(self, premises: Premises, adapter: str | None) -> None:
        super().note(premises, adapter)
        premises.as_trainable(self.get_base_layer().weight)  # type: ignore[arg-type]

    def prepare(self) -> PreparedCall:
        if self.keeper.obstacles.sharded:
            raise ValueError(
                f"{self.name}: FSDP has sharded a model that is split by tensor parallelism, and "
                "an adapter takes one of both: leave one out"
            )
        if self.get_base_layer().weight.requires_grad and self.active():
            raise ValueError(
                f"{self.name}: its weight is trained whole, which does not go with an adapter "
                "under tensor parallelism: freeze it"
            )
        return super().prepare()

    def compute(self, x: Tensor, call: PreparedCall, *args: Any, **kwargs: Any) -> Tensor:
        if call.operands is None:
            return super().compute(x, call, *args, **kwargs)
        weight, bias, delta, *rest = call.operands
        # a rowwise layer's parts give a sum, to which the bias is added once
        here_bias, last = (bias, None) if self.dim == "out" else (None, bias)
        given = weight, here(here_bias), here(delta), *rest
        slices = [(here(each), where) for each, where in call.slices]
        style, sizes = self._style
        (x,), _ = style.transform_inputs_pre_forward(sizes, (x,), {}, self.mesh)
        if isinstance(x, DTensor):
            x = x.to_local(grad_placements=[Partial()] if self.dim == "out" else None)
        y = super().compute(x, call._replace(operands=given, slices=slices))
        y = style.transform_output_post_forward(sizes, y, self.mesh)
        return y if last is None else y + here(last).to(y.dtype)

    def compute_mixed(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError("adapter_names does not go with tensor parallelism: call set_adapter")

    def get_delta_weight(self, adapter: str) -> Tensor:
        raise ValueError(
            f"{self.name}: a process has a part of the adapter only: save it, and load it without "
            "a tp_plan"
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


def receive_all(model: nn.Module, adapter: str, loaded: dict[str, Tensor]) -> None:
    """`ParallelLinear.receive` the deltas in `loaded`, by their names in the model. Raises
    ValueError, before anything changes, for an index that is not balanced over the parts.
    """
    found = []
    for name, layer in _layers(model, adapter):
        index, delta = (f"{name}.s2ft_{part}.{adapter}" for part in ("index", "delta"))
        if index in loaded and delta in loaded:
            layer._check_index(f"s2ft_index of adapter {adapter!r}", loaded[index])
            found.append((layer, index, delta))
    for layer, index, delta in found:
        loaded[delta] = layer.receive(adapter, loaded[index], loaded[delta])


def indices_of_parallel(model: nn.Module, adapter: str) -> dict[str, list[int]]:
    """`S2FTConfig.indices` of an adapter in a model that is split, by target; else none."""
    return {layer.name: layer.s2ft_index[adapter].tolist() for _, layer in _layers(model, adapter)}


def _layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, ParallelLinear]]:
    for name, layer in model.named_modules():
        if isinstance(layer, ParallelLinear) and adapter in layer.modes:
            yield name, layer


def here(value: Any) -> Any:
    """The part of a DTensor that this process has, for autograd."""
    return _Here.apply(value) if isinstance(value, DTensor) else value


class _Here(torch.autograd.Function):
    """`DTensor.to_local`, whose backward also notices that the DTensor was written to since the
    forward. Autograd asks for that of what a Function has saved, and writing to a DTensor does not
    show in its part.
    """

    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return value._local_tensor.view_as(value._local_tensor)

    @staticmethod
    def backward(ctx, grad):
        (value,) = ctx.saved_tensors
        mesh, placements = value.device_mesh, value.placements
        whole = dict(shape=value.shape, stride=value.stride())
        return DTensor.from_local(grad, mesh, placements, run_check=False, **whole)
