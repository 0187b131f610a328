"""Step times that may be compared: interleaved rounds, and ratios within a round.

A machine that slows down for a second slows all methods of that round alike, so the ratio of two
steps of one round is steadier than the ratio of two averages.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def order(names: Sequence[str], round_: int) -> list[str]:
    """The order of a round: every other one is the one before it reversed, then rotated by one.

    Over 2 * len(names) rounds each method takes every place, with two neighbours before it: none
    always runs on the caches that one other left behind.
    """
    shift = round_ // 2 % len(names)
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if round_ % 2 else rotated


def interleave(
    steps: Mapping[str, Callable[[int], object]], rounds: int, device: torch.device
) -> Iterator[dict[str, float]]:
    """Runs one step of each method a round, `steps[name](round)`; yields its seconds by name."""
    for round_ in range(rounds):
        seconds = {}
        for name in order(list(steps), round_):
            synchronize(device)
            start = time.perf_counter()
            steps[name](round_)
            synchronize(device)
            seconds[name] = time.perf_counter() - start
        yield {name: seconds[name] for name in steps}


def laps(parts: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Runs `parts` one after another, without a pause; the seconds of each.

    By CUDA events on a GPU: a part ends when the device has done it, and the host is not waited for
    between two parts, as it is not in a training loop.
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


@dataclass(frozen=True)
class Precision:
    """How long to measure: until the median is known to `error`, within the other limits."""

    error: float = 0.005  # standard error of the median, as a share of it
    min_rounds: int = 7
    max_rounds: int = 40
    min_seconds: float = 0.0  # steps of a moment agree, and those of the next are others
    seconds: float = 12.0  # after which min_rounds are enough

    def reached(self, data: Sequence[float], seconds: float) -> bool:
        """Whether `data`, one value a round, which took `seconds` in all, are enough."""
        if len(data) < max(2, self.min_rounds):
            return False
        if len(data) >= self.max_rounds:
            return True
        known = standard_error(data) <= self.error
        return seconds >= self.min_seconds and (known or seconds >= self.seconds)


def standard_error(data: Sequence[float]) -> float:
    """Standard error of the median of `data`, as a share of it; two values at least.

    From the quartiles, which a few steps that the machine disturbed do not move: those of a normal
    distribution are 1.349 sigma apart, and the median of n values errs by 1.253 sigma / sqrt(n).
    """
    spread = quartiles(data)
    return 1.253 / 1.349 * spread["iqr"] / math.sqrt(len(data)) / spread["median"]


def paired_ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Per round, step time over the reference's step time."""
    return [a / b for a, b in zip(seconds, reference, strict=True)]


def quartiles(data: Sequence[float]) -> dict:
    """Median, spread and the data itself; two values at least."""
    q1, median, q3 = statistics.quantiles(data, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "iqr": q3 - q1, "data": list(data)}


def stats(seconds: Sequence[float]) -> dict:
    """The statistics of pytest-benchmark, under its names; two values at least."""
    spread = quartiles(seconds)
    mean, deviation = statistics.fmean(seconds), statistics.stdev(seconds)
    far_from_mean = sum(abs(value - mean) > deviation for value in seconds)
    reach = 1.5 * spread["iqr"]
    far_out = sum(not spread["q1"] - reach <= s <= spread["q3"] + reach for s in seconds)
    return {
        "min": min(seconds),
        "max": max(seconds),
        "mean": mean,
        "stddev": deviation,
        "rounds": len(seconds),
        "iterations": 1,
        "ops": 1 / mean,
        "total": sum(seconds),
        "outliers": f"{far_from_mean};{far_out}",
        **spread,
    }
