"""A shard of a frozen weight that FSDP2 gathers with an adapter in it.

FSDP2 asks the local tensor of a sharded parameter what to gather, if that has a method for it. This
one hands out a copy of itself into which its owner has written. The shard itself is never written
to: a state_dict has W0, and each gather begins with W0.
"""

from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

_aten = torch.ops.aten
# What FSDP2, `to`, `to_empty` and DTensors do to a shard to get another one.
_GIVE_A_SHARD = {
    _aten._pin_memory.default,
    _aten._to_copy.default,
    _aten.alias.default,
    _aten.as_strided.default,
    _aten.clone.default,
    _aten.detach.default,
    _aten.empty_like.default,
    _aten.new_zeros.default,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.view.default,
}


class Owner(Protocol):
    """Who knows what belongs into a shard."""

    def write_into(self, copy: Tensor) -> None:
        """Write into a copy of the shard of this process, which is about to be gathered."""


class WrittenShard(Tensor):
    """A weight, or the shard of one, whose `owner` writes into what is gathered of it.

    Nothing can be computed with it before it is sharded: see `check_is_dense_here`.
    """

    held: Tensor
    owner: Owner

    @staticmethod
    def __new__(cls, held: Tensor, owner: Owner) -> "WrittenShard":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=held.device,
            requires_grad=False,
        )

    def __init__(self, held: Tensor, owner: Owner) -> None:
        self.held, self.owner = held, owner

    def __repr__(self, **_: Any) -> str:  # type: ignore[override] # torch's takes contents
        return f"WrittenShard({self.held!r})"

    def __tensor_flatten__(self) -> tuple[list[str], Owner]:
        return ["held"], self.owner

    @staticmethod
    def __tensor_unflatten__(
        tensors: dict[str, Tensor], owner: Owner, size: Any, stride: Any
    ) -> "WrittenShard":
        return WrittenShard(tensors["held"], owner)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch's is said to be a function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        shards = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, WrittenShard)]
        plain = pytree.tree_map_only(WrittenShard, lambda x: x.held, (args, kwargs or {}))
        made = func(*plain[0], **plain[1])
        if func._schema.name.endswith("_"):  # in place
            return args[0]
        if func in _GIVE_A_SHARD:
            owner = shards[0].owner
            return pytree.tree_map_only(Tensor, lambda x: WrittenShard(x, owner), made)
        return made

    # torch looks at how many arguments this one takes

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor, ...], None]:
        """What this process gives to the all-gather: in the dtype of products, and of the same size
        on all processes.
        """
        copy = self.held.clone()
        self.owner.write_into(copy)
        copy = copy.to(mp_policy.param_dtype or copy.dtype)
        rows = -(-outer_size[0] // mesh.size())
        if copy.shape[1:] == outer_size[1:] and len(copy) < rows:  # the last ones have fewer
            padded = copy.new_zeros(rows, *copy.shape[1:])
            padded[: len(copy)] = copy
            copy = padded
        return (copy,), None

    def fsdp_post_all_gather(
        self,
        gathered: tuple[Tensor, ...],
        metadata: None,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight, of whose memory FSDP takes care."""
        if out is not None:  # a view of the same memory
            return None
        (whole,) = gathered
        return whole, (whole,)


def give(module: nn.Module, owner: Owner) -> None:
    """Have the weight of a module gathered with what `owner` writes. A state_dict has a plain one.

    The weight is frozen, not sharded yet, and no other module's.
    """
    original: Any = module.weight
    weight = WrittenShard(original.detach(), owner)
    module.weight = nn.Parameter(weight, requires_grad=False)

    def plain(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if (value := state.get(f"{prefix}weight")) is not None:
            state[f"{prefix}weight"] = _without_owner(value)

    def after_load(module: nn.Module, incompatible_keys: Any) -> None:
        value: Any = module.weight  # assign=True has brought another one
        if isinstance(value, DTensor) and not isinstance(value._local_tensor, WrittenShard):
            value._local_tensor = WrittenShard(value._local_tensor, owner)

    module.register_state_dict_post_hook(plain)
    module.register_load_state_dict_post_hook(after_load)


def _without_owner(value: Tensor) -> Tensor:
    """A plain tensor, or a DTensor of one, in the same memory."""
    if isinstance(value, DTensor):
        return DTensor.from_local(
            _without_owner(value._local_tensor),
            value.device_mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )
    return value.held if isinstance(value, WrittenShard) else value
