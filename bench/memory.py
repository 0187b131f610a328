"""Bytes, counted exactly and on every device: what a model holds and what a forward keeps.

Bytes are those of whole storages, each counted once. A view of a few columns that keeps a big
activation alive therefore counts as the big activation.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Kept:
    """What is alive between a forward and its backward, model and loss aside, in bytes."""

    saved: int  # through save_for_backward: the saved activations
    unseen: int  # anything else the forward allocated and left alive, on a ctx or a module, say


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Unique storages: identity -> bytes."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return found


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(storages(tensors).values())


def model_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and the tensors in plain attributes of `model`'s modules."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def gradients(model: nn.Module) -> Iterator[Tensor]:
    return (p.grad for p in model.parameters() if p.grad is not None)


def states(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor))


def kept_by(forward: Callable[[], Tensor], model: nn.Module) -> Kept:
    """Runs `forward`, which returns a loss, and counts what waits for its backward.

    What `model` held before (parameters, buffers, other tensors of its modules) is not counted.
    """
    held_before = list(model_tensors(model))  # kept alive, so that their identities stay theirs
    held = storages(held_before)
    handles: weakref.WeakSet[_Handle] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Handle:
        # Detached: an output that its own node saves would hold that node, and itself, for ever.
        handle = _Handle(tensor.detach())
        handles.add(handle)
        return handle

    with saved_tensors_hooks(pack, lambda handle: handle.tensor), _Allocations() as allocations:
        loss = forward()

    # Only what the graph of the loss still holds: a handle dies with the last node that saved it.
    saved = storages(handle.tensor for handle in handles)
    ignored = held.keys() | storages([loss]).keys()
    return Kept(
        saved=sum(size for key, size in saved.items() if key not in held),
        unseen=sum(
            size
            for key, size in allocations.alive().items()
            if key not in ignored and key not in saved
        ),
    )


class _Handle:
    """Stands for a saved tensor in the graph."""

    __slots__ = ("tensor", "__weakref__")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class _Allocations(TorchDispatchMode):
    """Remembers the storage of everything an operator returned, without keeping it alive."""

    def __init__(self):
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = storages(_tensors((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs:
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> dict[int, int]:
        return {key: size for key, (ref, size) in self._seen.items() if not ref.expired()}


def _tensors(tree) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
