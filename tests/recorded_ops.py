"""A CUDA graph without CUDA: the operations of a step by tensor, to be done again in place.

As there, recording computes nothing: what existed is put back, what was made is NaN. A replay does
the same operations on the same memory, whatever Python would do by then. What would wait for the
device is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Recorder:
    """In the place of `s2kernels.recording.Recorder`."""

    def __init__(self, device: torch.device) -> None:
        self.num_recorded = 0

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def record(self, work: Callable[[], Tensor]) -> "_Tape":
        tape = _Tape()
        try:
            with tape:
                tape.result = work()
        finally:
            tape.undo()
        self.num_recorded += 1
        return tape


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        # function, arguments, and the tensors that it made, by their place among its results
        self.calls: list[tuple[Any, tuple, dict, dict[int, Tensor]]] = []
        self.made: dict[int, Tensor] = {}
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.result: Tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = {_place(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for place, x in given.items():
            if place not in self.made and place not in self.before:
                storage = x.untyped_storage()
                self.before[place] = storage, storage.clone()
        result = func(*args, **kwargs)
        made = {
            i: x.detach()
            for i, x in enumerate(tree_leaves(result))
            if isinstance(x, Tensor) and _place(x) not in given
        }
        self.made |= {_place(x): x for x in made.values()}
        if made or func._schema.is_mutable:  # others are views
            self.calls.append((func, args, kwargs, made))
        return result

    def undo(self) -> None:
        for storage, content in self.before.values():
            storage.copy_(content)
        for x in self.made.values():
            if x.is_floating_point():
                x.fill_(float("nan"))

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            results = tree_leaves(func(*args, **kwargs))
            for i, x in made.items():
                x.copy_(results[i])


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
