"""Buffers whose values outlive the meta device, fake tensors and sharding.

What an adapter trains is said by an index that was drawn: without its values nothing can be
computed, and nothing would bring them back. A model too large for one host is made on the meta
device, or of fake tensors, and its weights get values later; an index has them from the start. It
lies on the host until the weight has a device that holds values.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor, Replicate

# Within it, tensors that are made have values, whatever mode the caller is in.
with_values = unset_fake_temporarily


def local(tensor: Tensor) -> Tensor:
    """The tensor, or of a DTensor the part that this process holds."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor has values that can be read: not on the meta device, and not fake."""
    return not (tensor.is_meta or isinstance(local(tensor), FakeTensor))


def home_of(weight: Tensor) -> torch.device:
    """Where the index of an adapter of this weight lies."""
    return weight.device if has_values(weight) else torch.device("cpu")


def beside(values: Tensor, weight: Tensor) -> Tensor:
    """`values` as an operand beside the weight: without values where the weight has none."""
    weight = local(weight)
    if isinstance(weight, FakeTensor):
        return weight.fake_mode.from_tensor(values).to(weight.device)
    return values.to(weight.device)


class KeptBuffers(BufferDict):
    """Persistent buffers by adapter that keep their values when a module is moved to the meta
    device, or emptied: `to_empty`, which is for weights that are loaded afterwards.
    """

    def __init__(self) -> None:
        super().__init__({}, persistent=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeptBuffers":
        for name, before in self._buffers.items():
            if before is not None:
                self._buffers[name] = keep(before, fn)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._buffers:
            value = state_dict.get(prefix + name)
            if isinstance(value, DTensor):
                state_dict[prefix + name] = value.full_tensor()
        super()._load_from_state_dict(state_dict, prefix, *args)


def keep(before: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """The buffer where fn puts it, with the values that it has."""
    with with_values(), torch.no_grad():
        after = fn(before)
        if after is before:
            return before
        return before.cpu() if after.is_meta else after.copy_(before)


def replicated(value: Tensor, delta: Tensor) -> Tensor:
    """How a buffer is saved: beside a delta that is sharded, as a DTensor that all processes have,
    as what reads and writes the state of a sharded model expects of every tensor.
    """
    if not isinstance(delta, DTensor):
        return value
    mesh = delta.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
