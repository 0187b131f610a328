"""Step times that may be compared: interleaved rounds, and ratios within a round.

A machine that slows down for a second slows all methods of that round alike, so the ratio of two
steps of one round is steadier than the ratio of two averages.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def order(names: Sequence[str], round_: int) -> list[str]:
    """The order of a round: rotated by one every round, and every other round reversed.

    Over 2 * len(names) rounds each method takes every place, with two neighbours before it: none
    always runs on the caches that one other left behind.
    """
    shift = round_ % len(names)
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
