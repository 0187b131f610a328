"""What a step asks of the host: operators dispatched and kernels launched."""

from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel")


def operators(action: Callable[[], object]) -> int:
    """ATen operators that `action` dispatches, those of its backward passes too.

    Views count as operators. A Triton kernel is none: it is launched past the dispatcher.
    """
    with _Operators() as counted:
        action()
    return counted.number


def launches(action: Callable[[], object], device: torch.device) -> int | None:
    """CUDA kernels that `action` launches, Triton's too; None without CUDA or CUPTI's consent."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize(device)
    events = profiler.profiler.kineto_results.events()
    return launches_among(event.name() for event in events) or None


def launches_among(names: Iterable[str]) -> int:
    """Launches of a kernel among the names of a profile's events.

    Calls on the host are counted, not what ran on the device: a profile names ranges of the host
    on the device once more, and a kernel has no mark of its own there.
    """
    return sum(name.startswith(LAUNCHES) for name in names)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))
