"""A training step of every method at toy size: that each can be measured, not what it costs.

What steps cost is what `python -m bench.laboratory` measures.
"""

import pytest

from bench import fresh, rounds
from bench.cases import Case, toy
from bench.methods import Unavailable, comparable

CASES = [case for case in toy() if case.suite == "figure5"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.method)
def bench_step(benchmark, case: Case, device):
    budget = comparable(case.shape.config(case.length))
    try:
        method = fresh.build(case, budget, device, rounds.TIMING_LR)
    except Unavailable as reason:
        pytest.skip(str(reason))
    batch = next(fresh.random_batches(case, device))
    benchmark.group = case.suite
    benchmark.pedantic(method.step, (batch,), rounds=3, warmup_rounds=rounds.WARM_UP)
