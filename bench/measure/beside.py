"""A benchmark beside others, in one run: what a ratio on a noisy machine needs."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

ROUNDS, SECONDS = 60, 15.0


def compare(
    benchmark: Any,
    run: Callable[[], object],
    others: Mapping[str, Callable[[], object]],
    name: str = "ours",
    **info: Any,
) -> None:
    """Times `run`, and right before each of its rounds all `others`; extra_info gets

    seconds  by name, `name` being that of `run`, the median
    rounds   by name, the seconds of every round
    ratios   by name of the others: run / other, the median and the quartiles of the rounds' ratios
    load     the machine's load average, of one minute, before
    """
    if benchmark.disabled:  # each runs once
        for other in others.values():
            other()
        benchmark(run)
        return
    info |= {"load": os.getloadavg()[0]}
    seconds: dict[str, list[float]] = {name: [] for name in others}

    def timed_others() -> None:
        for name, other in others.items():
            began = time.perf_counter()
            other()
            seconds[name].append(time.perf_counter() - began)

    for _ in range(3):
        run()
        timed_others()
    round_ = 2 * max(min(found) for found in seconds.values()) + 1e-6
    rounds = max(7, min(ROUNDS, int(SECONDS / round_ / max(1, len(others) / 2))))
    for found in seconds.values():
        found.clear()
    benchmark.pedantic(run, setup=timed_others, rounds=rounds, iterations=1)
    seconds = {name: list(benchmark.stats.stats.data), **seconds}
    benchmark.extra_info.update(
        info,
        seconds={name: statistics.median(found) for name, found in seconds.items()},
        rounds=seconds,
        ratios={other: quartiles(seconds[name], seconds[other]) for other in others},
    )


def quartiles(some: list[float], others: list[float]) -> dict[str, float]:
    """Of some / other, round by round."""
    ratios = [a / b for a, b in zip(some, others, strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4)
    return {"median": median, "q1": first, "q3": third}
