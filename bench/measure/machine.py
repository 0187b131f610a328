"""The machine and the code that numbers were measured with, and what is asked of its memory."""

import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch
from cpuinfo import get_cpu_info
from torch.utils.collect_env import get_nvidia_driver_version, run

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "peft")
# glibc's mallopt: give nothing back (M_TRIM_THRESHOLD), map nothing apart (M_MMAP_MAX), have one
# heap (M_ARENA_MAX). The numbers of the parameters are those of its malloc.h.
KEEP_FREED = {-1: -1, -4: 0, -8: 1}
# In RuntimeErrors: of torch's allocator on a CPU, and of what takes memory past that on a GPU.
NO_MEMORY = (
    *("DefaultCPUAllocator", "CUDA error: out of memory"),
    *("Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The folder of a device's results: "cpu", or "nvidia-h200" and the like."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def machine_info(device: torch.device) -> dict:
    """What the numbers depend on; without the name of the host."""
    gpu = device.type == "cuda"

    def version_of(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "machine": platform.machine(),
        "python_version": platform.python_version(),
        "cpu": {"brand_raw": get_cpu_info()["brand_raw"], "count": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "driver": get_nvidia_driver_version(run) if gpu else None,
        **{package: version_of(package) for package in PACKAGES},
    }


def same_machine(a: dict, b: dict) -> bool:
    """Whether two machine_infos say that times may stand side by side: device and packages."""
    device = ("gpu",) if a.get("gpu") else ("gpu", "machine", "cpu", "threads")
    return all(a.get(name) == b.get(name) for name in (*device, *PACKAGES))


@functools.cache
def source_hash() -> str:
    """Of the package without its commands, and of bench."""
    package, commands = ROOT / "s2kernels", ROOT / "s2kernels" / "cli"
    files = [file for file in package.rglob("*.py") if commands not in file.parents]
    digest = hashlib.sha256()
    for file in sorted([*files, *(ROOT / "bench").rglob("*.py")]):
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for what comes next, as the allocator of CUDA does.

    By default it unmaps a large tensor when it is freed, and the kernel clears its pages again in
    every step, which takes longer on a busy machine.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in KEEP_FREED.items():
            if not libc.mallopt(parameter, value):
                raise RuntimeError(f"glibc refuses mallopt({parameter}, {value})")


def release(device: torch.device) -> None:
    """Gives back what earlier models held; they are cycles, which only the collector frees."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says that the memory of the device is too small."""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)
