"""What the machine can do at most: rates of matrix products and of copies, on random data."""

import statistics
from collections.abc import Callable

import torch

from bench import timing

GEMM = {"cpu": 1024, "cuda": 8192}  # M = N = K
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}  # several times the last cache
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 10


def measure(device: torch.device) -> dict:
    """{"gemm_flops": FLOP/s by dtype, "copy_bytes_per_second": B/s, read and written}: medians.

    fp32 products as the steps run them: with TF32 only if torch is set to it.
    """
    return {
        "gemm_flops": {
            str(dtype).removeprefix("torch."): gemm_flops(device, dtype) for dtype in DTYPES
        },
        "copy_bytes_per_second": copy_bytes_per_second(device),
    }


def gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = GEMM[device.type]
    x, weight = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: torch.nn.functional.linear(x, weight), device)


def copy_bytes_per_second(device: torch.device) -> float:
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device.type] / seconds(lambda: target.copy_(source), device)


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Median of ROUNDS calls, after two more."""
    timing.laps([action] * 2, device)
    return statistics.median(timing.laps([action] * ROUNDS, device))
