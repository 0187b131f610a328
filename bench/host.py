"""What this process asks of the machine's memory, so that steps are measured alike."""

import ctypes
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Parameters of glibc's mallopt, from its malloc.h, and the values for `keep_freed_memory`.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
# Give nothing back from the heap, take all from it, and have no second heap beside it, to which a
# thread would turn for good once memory was short.
KEPT = {TRIM_THRESHOLD: -1, MMAP_MAX: 0, ARENA_MAX: 1}


def keep_freed_memory() -> str | None:
    """Has glibc keep what is freed for what comes next; says so, None where it is not glibc.

    By default it maps large tensors one by one and unmaps them when they are freed, so that in
    every step the kernel has to find and clear the pages of all temporaries anew: 1.3 GB a step of
    DoRA's at the width of a 1B model, at a price that depends on what else the machine does. That
    of CUDA keeps freed memory, and so do the allocators that torch advises to use on a CPU.
    """
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    for parameter, value in KEPT.items():
        if not libc.mallopt(parameter, value):
            raise RuntimeError(f"glibc refuses mallopt({parameter}, {value})")
    return "glibc, M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1, M_ARENA_MAX=1"


def give_back() -> None:
    """Gives the kernel what is free in the heap: the next case begins as the first one did."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def within_free_memory(device: torch.device) -> Iterator[None]:
    """On a CPU, what the machine has free is all that this process may still take.

    An allocation beyond it fails, which is a result, where Linux would end the process. CUDA says
    by itself that it has no more, and reserves addresses that no limit should meet.
    """
    meminfo, status = Path("/proc/meminfo"), Path("/proc/self/status")
    if device.type != "cpu" or not (meminfo.is_file() and status.is_file()):
        yield
        return
    limit = _kilobytes(status, "VmData") + _kilobytes(meminfo, "MemAvailable")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit * 1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _kilobytes(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
