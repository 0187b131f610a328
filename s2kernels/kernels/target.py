"""What the launchers ask about dtype, layout and hardware. No other file of the kernels does."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from s2kernels.kernels.tuned import FASTER, LAUNCH


@dataclass(frozen=True)
class Chip:
    """arch: "sm_90", "gfx942" and the like; name: the device's, as the driver gives it."""

    name: str
    arch: str
    num_sms: int


# Without a GPU the interpreter sees the launches of an H100, and the compiler those of whichever
# chip it compiles for.
WITHOUT_GPU = Chip("none", "sm_90", 132)

# Those with TMA and the shared memory that the descriptor kernels were compiled for.
_WITH_DESCRIPTORS = ("sm_90", "sm_100")


def chip(device: torch.device) -> Chip:
    """The chip of `device`, or WITHOUT_GPU."""
    return _cuda_chip(device) if device.type == "cuda" else WITHOUT_GPU


@lru_cache
def _cuda_chip(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Chip(properties.name, arch, properties.multi_processor_count)


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors (compute units on AMD) of `device`."""
    return _cuda_sms(device) if device.type == "cuda" else WITHOUT_GPU.num_sms


@lru_cache
def _cuda_sms(device: torch.device) -> int:
    # Not by way of a Chip, which torch.compile would have to trace.
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_parameters(table: dict[str, dict[str, int]], dtype: torch.dtype) -> dict[str, int]:
    """The entry of a kernel's launch table for `dtype`; ValueError for one it does not take."""
    return table[_dtype_key(dtype)]


def tuned_parameters(
    op: str, x: Tensor, sizes: tuple[int, ...], num_tokens: int, default: dict[str, int]
) -> dict[str, int]:
    """What was measured to be fastest for `op` on tensors like x, else `default`.

    sizes are matched exactly, num_tokens by the next larger one measured, or the largest; and so is
    R, the second of the sizes (P, R) of slice_grad. While torch.compile traces it is the default,
    whose choice needs no look at the device.
    """
    if torch.compiler.is_compiling():
        return default
    by_sizes = LAUNCH.get((chip(x.device).arch, op, _dtype_key(x.dtype)))
    if not by_sizes:
        return default
    if op == "slice_grad" and sizes not in by_sizes:
        P, R = sizes
        sizes = P, next_larger(R, [rank for wide, rank in by_sizes if wide == P])
    measured = by_sizes.get(sizes)
    return (measured[next_larger(num_tokens, measured)] if measured else None) or default


def next_larger(value: int, measured: Iterable[int]) -> int:
    """The least of `measured` that is no less than value, else the largest; 0 of none."""
    ordered = sorted(measured)
    return next((each for each in ordered if each >= value), ordered[-1] if ordered else 0)


def measured_faster(op: str, x: Tensor, weight: Tensor) -> bool:
    """Whether Triton was measured to be faster than torch in `op` with a weight of this shape, at
    fewer and at more tokens than x has, or as many. Measured were contiguous, aligned matrices.
    """
    measured = FASTER.get((chip(x.device).name, op, str(x.dtype).removeprefix("torch.")), {})
    ranges = measured.get((weight.shape[0], weight.shape[1]), ())
    num_tokens = x.numel() // max(1, x.shape[-1])
    return any(first <= num_tokens <= last for first, last in ranges) and all(
        matrix.is_contiguous() and matrix.data_ptr() % 16 == 0 for matrix in (x, weight)
    )


def _dtype_key(dtype: torch.dtype) -> str:
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    if dtype == torch.float32:
        return "float32"
    raise ValueError(
        f"the Triton kernels take float32, float16 and bfloat16, got {dtype}: use impl='torch'"
    )


def has_descriptors(device: torch.device) -> bool:
    """Whether the descriptor kernels run on `device`."""
    return chip(device).arch in _WITH_DESCRIPTORS


def takes_descriptors(*matrices: Tensor) -> bool:
    """Whether the chip's copy engine can load and store these matrices: 16-bit, rows contiguous and
    16-byte aligned, none empty.

    Never while torch.compile traces: a traced tensor has no address to look at.
    """
    if torch.compiler.is_compiling() or not has_descriptors(matrices[0].device):
        return False
    return all(
        x.element_size() == 2
        and x.numel() > 0
        and x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
        for x in matrices
    )


def on_device(x: Tensor) -> AbstractContextManager:
    """Makes the device of x the current one, on which Triton launches; torch.compile traces it."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
