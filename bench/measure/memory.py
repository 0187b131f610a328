"""Bytes, counted exactly and on every device: what a model holds, a forward keeps, a step needs.

Bytes that are held are those of whole storages, each counted once. A view of a few columns that
keeps a big activation alive therefore counts as the big activation. Peaks are the allocator's own.
"""

import math
import os
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Else the profiler tells standard error of every session. It reads this at its first.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Kept:
    """What is alive between a forward and its backward, model and loss aside, in bytes."""

    saved: int  # through save_for_backward: the saved activations
    unseen: int  # anything else the forward allocated and left alive, on a ctx or a module, say


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Unique storages: identity -> bytes."""
    return {storage._cdata: storage.nbytes() for storage in _storages(tensors)}


def follow(tensors: Iterable[Tensor], alive: dict[int, int]) -> None:
    """Adds the storages of `tensors` to `alive`, identity -> bytes, until they are freed."""
    for storage in _storages(tensors):
        if storage._cdata not in alive:
            alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, alive.pop, storage._cdata)


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    return (part.untyped_storage() for tensor in tensors for part in dense_parts(tensor))


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What has a storage: of a sparse tensor its indices and its values."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    return (tensor,)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(storages(tensors).values())


def model_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and the tensors in plain attributes of `model`'s modules."""
    for module in model.modules():
        yield from tensors_in(vars(module))


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of containers and, within these, of dataclasses."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_in([getattr(leaf, field.name) for field in fields(leaf)])


def gradients(model: nn.Module) -> Iterator[Tensor]:
    return (p.grad for p in model.parameters() if p.grad is not None)


def states(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return tensors_in(dict(optimizer.state))


def kept_by(forward: Callable[[], Tensor], model: nn.Module) -> Kept:
    """Runs `forward`, which returns a loss, and counts what waits for its backward.

    What `model` held before (parameters, buffers, other tensors of its modules) is not counted.
    """
    held_before = list(model_tensors(model))  # kept alive, so that their identities stay theirs
    held = storages(held_before)
    packed: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        # Detached: an output that its own node saves would hold that node, and itself, for ever.
        tensor = tensor.detach()
        packed.append(weakref.ref(tensor))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), _Allocations() as allocations:
        loss = forward()

    # Only what the graph of the loss still holds: it dies with the last node that saved it.
    saved = storages(tensor for each in packed if (tensor := each()) is not None)
    ignored = held.keys() | storages([loss]).keys()
    alive = allocations.alive
    return Kept(
        saved=sum(size for key, size in saved.items() if key not in held),
        unseen=sum(alive[key] for key in alive.keys() - ignored - saved.keys()),
    )


def peaks(actions: Sequence[Callable[[], object]], device: torch.device) -> list[int]:
    """Runs `actions` one after another; the most bytes alive at any moment of each.

    Alive are the bytes that the allocator of `device` handed out since this call began and has not
    got back: temporaries inside an operator count. What was there before does not, and should stay.
    On a CPU torch's allocator reports them, without what a library takes by itself. On CUDA they
    are blocks of the caching allocator, in whole 512 bytes, and the workspace of cuBLAS is one.
    """
    if device.type != "cuda":
        return _cpu_peaks(actions)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    found = []
    for action in actions:
        torch.cuda.reset_peak_memory_stats(device)
        action()
        torch.cuda.synchronize(device)
        found.append(torch.cuda.max_memory_allocated(device) - before)
    return found


def _cpu_peaks(actions: Sequence[Callable[[], object]]) -> list[int]:
    window = "memory.peaks"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for action in actions:
            with record_function(window):
                action()

    reports, windows = [], []
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            if fields.device.type == "cpu":
                reports.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.name == window:
            windows.append((event.start_time_ns, event.end_time_ns))
    return _peaks_within(sorted(windows), sorted(reports, key=lambda report: report[0]))


def _peaks_within(
    windows: Sequence[tuple[int, int]], reports: Sequence[tuple[int, int, int]]
) -> list[int]:
    """The most bytes alive within each window (start, end), all in nanoseconds.

    reports: (time, address, bytes), in order of time; bytes below 0 are given back.
    """
    sizes: dict[int, int] = {}  # of the blocks alive that were handed out since the start
    levels = [(-math.inf, 0)]  # bytes alive from a time on
    for time, address, size in reports:
        if size > 0:
            sizes[address] = size
            levels.append((time, levels[-1][1] + size))
        else:  # 0 for a block older than the first report: its size is not known
            levels.append((time, levels[-1][1] - sizes.pop(address, 0)))
    times = [time for time, _ in levels]
    return [
        max(alive for _, alive in levels[bisect_left(times, start) - 1 : bisect_right(times, end)])
        for start, end in windows
    ]


class _Allocations(TorchDispatchMode):
    """alive: the storages that operators make and that are not yet freed, identity -> bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = storages(tensors_in((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        made = (x for x in tensors_in(result) if given.keys().isdisjoint(storages([x])))
        follow(made, self.alive)
        return result
