"""What the launchers ask about dtype and hardware. No other file of the kernels does."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

# Without a GPU the interpreter and the compiler see the launches of an H100.
_NUM_SMS_WITHOUT_GPU = 132


def launch_parameters(table: dict[str, dict[str, int]], dtype: torch.dtype) -> dict[str, int]:
    """The entry of a kernel's launch table for `dtype`; ValueError for one it does not take."""
    if dtype in (torch.float16, torch.bfloat16):
        return table["half"]
    if dtype == torch.float32:
        return table["float32"]
    raise ValueError(
        f"the Triton kernels take float32, float16 and bfloat16, got {dtype}: use impl='torch'"
    )


@lru_cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors (compute units on AMD) of `device`."""
    if device.type != "cuda":
        return _NUM_SMS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(x: Tensor) -> AbstractContextManager:
    """Makes the device of x the current one, on which Triton launches; torch.compile traces it."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
