"""What a user calls so that S2FT is in place under FSDP2."""

from collections.abc import Callable

from torch import nn
from torch.distributed.tensor import Shard

from s2kernels.coupling import is_conv1d
from s2kernels.peft.host.sharding import check_is_whole
from s2kernels.peft.host.written_shard import give
from s2kernels.peft.s2ft.gathered import Gathered
from s2kernels.peft.s2ft.linear import S2FTLinear


def fsdp_placement(model: nn.Module) -> Callable[[nn.Parameter], Shard]:
    """What `fully_shard` takes as `shard_placement_fn`, so that S2FT is in place under FSDP2.

        model = get_peft_model(model, S2FTConfig())
        placement = fsdp_placement(model)
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, shard_placement_fn=placement)
        fully_shard(model, shard_placement_fn=placement)

    From then on the weights that S2FT writes to are gathered with the slice in them, and hold W0
    between gathers. Without this call, S2FT is additive under FSDP2. Linear layers are served;
    experts stay additive.

    A target that trains output channels is sharded by columns, whose number must be a multiple of
    the number of processes. `reshard_after_forward` must not be a number of processes.

    Raises ValueError for a model without S2FT layers whose weights could be written to, for one
    that is sharded already, and for one in whose weights something is merged.
    """
    check_is_whole(model)
    layers = [module for module in model.modules() if isinstance(module, S2FTLinear)]
    if any(layer.merged for layer in layers):
        raise ValueError("an adapter is merged into the weights: call unmerge_adapter first")
    for keeper in {layer.keeper for layer in layers}:
        keeper.release()
        keeper.obstacles.look()
    columns: set[int] = set()
    layers = [layer for layer in layers if layer.gathered is not None or _can_be_written(layer)]
    if not layers:
        raise ValueError(
            "the model has no S2FT layer whose weight can be written to: a frozen and dense one, "
            "of an adapter with mode='auto' or 'inplace'"
        )
    for layer in layers:
        if layer.gathered is None:
            layer.known.renew()
            layer.gathered = Gathered(layer)
            give(layer.get_base_layer(), layer.gathered)
            layer.keeper.changed()
        if (layer.dim == "out") != is_conv1d(layer.get_base_layer()):
            columns.add(id(layer.weight))
        if layer.dim == "out":
            columns |= {id(delta) for delta in layer.s2ft_delta.values()}
    return lambda parameter: Shard(1 if id(parameter) in columns else 0)


def _can_be_written(layer: S2FTLinear) -> bool:
    if layer.weight.requires_grad or all(mode == "additive" for mode in layer.modes.values()):
        return False
    if layer.weight.is_meta:  # loaded later
        return (layer.obstacle() or layer.keeper.obstacles.of(layer.weight)) is None
    return layer.not_inplace() is None
