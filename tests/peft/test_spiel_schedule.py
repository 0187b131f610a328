"""When SpIEL replaces entries, how many, and what moves along with them."""

import math

import pytest
import torch

from s2kernels.peft.spiel.replace import best_free, replacement, smallest
from s2kernels.peft.spiel.schedule import Schedule


def test_windows_and_reselections_with_the_published_defaults():
    schedule = Schedule(100, reselection_steps=20, accumulation_steps=5)
    assert [step for step in range(1, 101) if schedule.reselects(step)] == [5, 25, 45, 65, 85]
    watched = [step for step in range(1, 50) if schedule.watches(step)]
    assert watched == [*range(1, 6), *range(20, 26), *range(40, 46)]


def test_rates():
    linear = Schedule(100, initial_rate=0.2)
    assert [linear.rate(step) for step in (5, 25, 50, 100, 120)] == pytest.approx(
        [1.0, 0.15, 0.1, 0.0, 0.0]
    )
    raised = Schedule(100, initial_rate=0.4, final_rate=0.1)
    assert [raised.rate(step) for step in (25, 50, 100)] == pytest.approx([0.325, 0.25, 0.1])
    cosine = Schedule(100, initial_rate=0.4, final_rate=0.1, decay="cosine")
    for step in (5, 25, 50, 100):
        want = 0.1 + 0.3 * (1 + math.cos(math.pi * step / 100)) / 2
        assert cosine.rate(step) == pytest.approx(want)


def test_counts_are_rounded_down():
    schedule = Schedule(100, initial_rate=0.58, decay="linear")
    assert schedule.rate(50) * 100 < 29  # 28.999999999999996
    assert schedule.count(50, 100) == 29
    assert schedule.count(50, 99) == 28
    assert schedule.count(100, 99) == 0
    assert schedule.count(5, 99) == 99


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(total_steps=0), "total_steps must be at least 1, got 0"),
        (dict(accumulation_steps=0), "accumulation_steps must be at least 1"),
        (dict(reselection_steps=5), "less than reselection_steps, got 5 and 5"),
        (dict(initial_rate=1.1), r"initial_rate must lie in \[0, 1\], got 1.1"),
        (dict(final_rate=-0.1), r"final_rate must lie in \[0, 1\], got -0.1"),
        (dict(decay="steps"), "decay must be one of 'linear', 'cosine', got 'steps'"),
    ],
)
def test_schedule_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**dict(total_steps=10) | fields)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("num", (0, 1, 7, 12))
def test_a_replacement_moves_every_value_with_its_entry(num, dtype):
    """Against a dictionary from position to value."""
    generator = torch.Generator().manual_seed(num)
    for _ in range(20):
        index = torch.randperm(40, generator=generator)[:12].sort().values.to(dtype)
        delta = torch.randn(12, generator=generator)
        candidates = torch.randperm(40, generator=generator)[:12].sort().values.to(dtype)
        scores = torch.rand(12, generator=generator)
        dropped = smallest(delta, num)
        assert dropped.sum() == num
        if 0 < num < 12:
            assert delta[dropped].abs().max() <= delta[~dropped].abs().min()

        staying = set(index[~dropped].tolist())
        chosen = best_free(candidates, scores, index[~dropped], num)
        free = [p for p in candidates.tolist() if p not in staying]
        rank = dict(zip(candidates.tolist(), scores.tolist(), strict=True))
        assert chosen.tolist() == sorted(sorted(free, key=lambda p: -rank[p])[:num])

        replaced = replacement(index, dropped, chosen)
        positions = replaced.index.tolist()
        assert replaced.index.dtype == dtype
        assert positions == sorted(staying | set(chosen.tolist())) and len(set(positions)) == 12
        assert replaced.grown.tolist() == sorted(set(chosen.tolist()) - set(index.tolist()))
        values = delta.clone()
        seeds = torch.randn(len(replaced.grown), generator=generator)
        replaced.apply_(values, seeds)
        # an entry that is dropped and chosen at once is left as it is
        want = dict(zip(index.tolist(), delta.tolist(), strict=True))
        want |= dict(zip(replaced.grown.tolist(), seeds.tolist(), strict=True))
        assert values.tolist() == [want[p] for p in positions]


def test_ties_go_to_the_front():
    delta = torch.tensor([0.5, -0.25, 0.25, 0.0, 0.25])
    assert smallest(delta, 3).tolist() == [False, True, True, True, False]
    candidates = torch.tensor([2, 4, 6, 8], dtype=torch.int32)
    staying = torch.tensor([4], dtype=torch.int32)
    assert best_free(candidates, torch.ones(4), staying, 2).tolist() == [2, 6]
