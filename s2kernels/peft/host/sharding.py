"""What FSDP, DeepSpeed's ZeRO-3 and tensor parallelism have done to the weights of a model."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from s2kernels.peft.host.written_shard import WrittenShard


def is_gathered(model: nn.Module) -> bool:
    """Whether FSDP gathers weights of the model for each forward and backward: as parts of it were
    wrapped, or the whole, or what the model is a part of.
    """
    return any(
        isinstance(module, FSDPModule) or getattr(module, "_is_fsdp_managed_module", False)
        for module in model.modules()
    )


def check_not_partitioned(weights: Iterable[Tensor]) -> None:
    """Raises ValueError for weights that DeepSpeed ZeRO-3 has partitioned."""
    if any("ds_id" in vars(weight) for weight in weights):
        raise ValueError(
            "the parameters are partitioned by DeepSpeed ZeRO-3, which gathers them for the "
            "forward of their own module alone: use FSDP2, or ZeRO 1 or 2"
        )


def num_shards(model: nn.Module) -> int:
    """Into how many parts a tp_plan of transformers has split the weights of the model; 1 without
    tensor parallelism.
    """
    return getattr(model, "_tp_size", None) or 1


def check_is_whole(model: nn.Module, takes_plans: bool = False) -> None:
    """Raises ValueError for a model to which no adapter can be added, since its weights are spread
    over processes.

    takes_plans: whether the adapter may lie in weights that a tp_plan of transformers has split.
    """
    parameters = list(model.parameters())
    check_not_partitioned(parameters)
    if is_gathered(model):
        raise ValueError(
            "the model is sharded already, and FSDP would not reduce the gradients of an adapter "
            "that is added now: add it first, then shard the model"
        )
    if takes_plans and num_shards(model) > 1:
        return
    if any(isinstance(value, DTensor) for value in parameters) or num_shards(model) > 1:
        raise ValueError(
            "the weights are split by tensor parallelism, which goes with S2FT alone, in a model "
            "that from_pretrained has split by a tp_plan: load the model without one, and shard "
            "it by FSDP2 once the adapter is added"
        )


def check_is_dense_here(name: str, weight: Tensor) -> None:
    """Raises ValueError for a weight that is not gathered where its layer `name` computes."""
    if isinstance(weight, WrittenShard):
        raise ValueError(
            f"{name}: fsdp_placement was called, and the model is not sharded: give what it "
            "returned to fully_shard before the first forward"
        )
    if isinstance(weight, DTensor):
        raise ValueError(
            f"{name}: the weight is a DTensor where it is multiplied: after tensor parallelism "
            "(shard by FSDP2), or where a layer is called outside of the forward of the module "
            "that fully_shard was given"
        )
