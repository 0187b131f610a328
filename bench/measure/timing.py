"""Step times that may be compared: interleaved steps, and ratios within a round.

A machine that slows down for a second slows both steps of a round. So the ratio of two steps of one
round is steadier than the ratio of two averages.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from pytest_benchmark.stats import Stats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds for each of `launches` launches, once the device has done them."""

    def __init__(self, device: torch.device, launches: int = 1) -> None:
        self.device, self.launches = device, launches

    def __call__(self) -> float:
        synchronize(self.device)
        return time.perf_counter() / self.launches


def interleave(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> Iterator[dict[str, float]]:
    """Runs each step once a round; yields the seconds of the round by name. Each takes every place:
    every second round reverses the order of the one before it, then rotates it by one.
    """
    for round_ in range(rounds):
        names, shift = list(steps), round_ // 2 % len(steps)
        names = [*names[shift:], *names[:shift]][:: -1 if round_ % 2 else 1]
        seconds = dict(zip(names, laps([steps[name] for name in names], device), strict=True))
        yield {name: seconds[name] for name in steps}


def laps(parts: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Runs `parts` one after another, without a pause; the seconds of each.

    On a GPU a part ends when the device has done it (CUDA events); the host does not wait for it.
    """
    synchronize(device)
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for part in parts:
            part()
            marks.append(time.perf_counter())
        return [end - start for start, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
    events[0].record()
    for part, event in zip(parts, events[1:], strict=True):
        part()
        event.record()
    synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def quartiles(data: Sequence[float]) -> dict:
    """Median, spread and the data itself; two values at least."""
    q1, median, q3 = statistics.quantiles(data, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "iqr": q3 - q1, "data": list(data)}


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> dict:
    """Quartiles of step time over the reference's step time, round by round."""
    return quartiles([a / b for a, b in zip(seconds, reference, strict=True)])


def stats(seconds: Sequence[float]) -> dict:
    """What pytest-benchmark says of so many rounds."""
    found = Stats()
    for value in seconds:
        found.update(value)
    return found.as_dict() | {"iterations": 1, "data": list(seconds)}
