"""Fresh models of a case, the tokens that they see, and the memory that they take."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import host, timing
from bench.cases import Case
from bench.methods import METHODS, Budget, Method

# In RuntimeErrors: of torch's allocator on a CPU, and of what takes memory past that on a GPU.
NO_MEMORY = (
    *("DefaultCPUAllocator", "CUDA error: out of memory"),
    *("Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
)


class WrongMethod(RuntimeError):
    """A method does not do what it says; its cost would say nothing."""


@dataclass
class Setup:
    """Where and how exactly to measure."""

    device: torch.device
    precision: timing.Precision  # of one visit
    ceilings: dict | None = None  # of bench.ceilings; None: no prediction


def build(case: Case, budget: Budget, device: torch.device, lr: float) -> Method:
    """The method of `case` at work on a fresh model."""
    dtype = getattr(torch, case.dtype)
    model = case.shape.build(case.length, dtype, device, seed=budget.seed)
    return METHODS[case.method](model, budget, lr, case.options)


def random_batches(case: Case, device: torch.device) -> Iterator[Tensor]:
    """Batches of random tokens, int64 (batch, length), without end."""
    generator = torch.Generator().manual_seed(1)
    while True:
        size = (case.batch, case.length)
        yield torch.randint(case.shape.vocab, size, generator=generator).to(device)


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says that the memory of the device is too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def release(device: torch.device) -> None:
    """Gives back what earlier cases held: models are cycles, which only the collector frees."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        host.give_back()
