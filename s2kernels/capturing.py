"""Whether what runs is being recorded as a CUDA graph, or is to be recorded later on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_num_rehearsals = 0  # of all threads, as a recomputed checkpoint runs in that of its backward


@contextmanager
def rehearsing() -> Iterator[None]:
    """Within, models compute what they compute while a graph is captured."""
    global _num_rehearsals
    _num_rehearsals += 1
    try:
        yield
    finally:
        _num_rehearsals -= 1


def is_rehearsing() -> bool:
    """Whether anything runs inside `rehearsing`."""
    return _num_rehearsals > 0


def is_capturing() -> bool:
    """Whether a CUDA graph is captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
