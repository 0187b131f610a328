import math

import pytest
import torch

from s2kernels.select import budget, random_scores, random_units, ranked_units

NAME = "model.layers.0.mlp"


def test_random_units_is_pinned():
    """Everybody who asks with these arguments gets these units: runs can be repeated."""
    assert random_units(0, NAME, 32, 6).tolist() == [0, 11, 15, 18, 25, 30]
    assert random_units(1, NAME, 32, 6).tolist() == [0, 1, 2, 12, 21, 25]
    assert random_units(0, "model.layers.1.mlp", 32, 6).tolist() == [7, 12, 18, 20, 24, 29]
    assert random_units(0, NAME, 14336, 5).tolist() == [3595, 5454, 8355, 9490, 14331]
    assert random_units(0, NAME, 40, 8, block=4).tolist() == [20, 21, 22, 23, 24, 25, 26, 27]


def test_random_units_depends_on_its_arguments_alone():
    expected = random_units(7, NAME, 100, 10)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    random_units(7, "another", 100, 10)
    with torch.device("meta"):
        again = random_units(7, NAME, 100, 10)
    assert torch.equal(again, expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "total, count, block", [(8, 8, 1), (32, 5, 1), (1, 1, 1), (100, 24, 8), (64, 64, 64)]
)
def test_random_units_form(total, count, block):
    for seed in range(20):
        units = random_units(seed, NAME, total, count, block)
        assert (units.dtype, units.shape) == (torch.int32, (count,))
        assert (units[1:] > units[:-1]).all()
        assert 0 <= units[0] and units[-1] < total // block * block
        starts = units[::block]
        assert (starts % block == 0).all()
        assert torch.equal(units, (starts[:, None] + torch.arange(block)).flatten())


@pytest.mark.parametrize("vary", ["seed", "name"])
def test_random_units_is_fair(vary):
    """Each unit, and each pair of neighbours, is drawn as often as chance has it."""
    total, count, draws = 16, 4, 2000
    hits, pairs = torch.zeros(total), torch.zeros(total - 1)
    for i in range(draws):
        seed, name = (i, NAME) if vary == "seed" else (0, f"model.layers.{i}.mlp")
        drawn = torch.zeros(total)
        drawn[random_units(seed, name, total, count).long()] = 1
        hits += drawn
        pairs += drawn[1:] * drawn[:-1]
    p, p_pair = count / total, count * (count - 1) / (total * (total - 1))
    assert (hits - draws * p).abs().max() < 4 * math.sqrt(draws * p * (1 - p))
    assert (pairs - draws * p_pair).abs().max() < 4 * math.sqrt(draws * p_pair * (1 - p_pair))


@pytest.mark.parametrize("total, count, block", [(8, 0, 1), (8, 9, 1), (8, 3, 2), (9, 9, 10)])
def test_random_units_refuses(total, count, block):
    with pytest.raises(ValueError, match=f"{NAME}: {count} units wanted of {total} in blocks"):
        random_units(0, NAME, total, count, block)


@pytest.mark.parametrize(
    "value, total, block, expected",
    [
        (1, 32, 1, 1),
        (32, 32, 1, 32),
        (1.0, 32, 1, 32),
        (0.02, 11008, 1, 220),
        (0.052, 32, 1, 2),
        (0.5, 5, 1, 3),  # halves go up
        (1e-9, 32, 1, 1),  # never nothing
        (0.02, 11008, 128, 256),
        (1, 256, 64, 64),
        (64, 256, 64, 64),
        (65, 256, 64, 128),
        (1.0, 100, 64, 64),  # no second whole block
        (99, 100, 1, 99),
    ],
)
def test_budget(value, total, block, expected):
    assert budget(value, total, "channels", block) == expected


@pytest.mark.parametrize(
    "value, error, message",
    [
        (40, ValueError, "heads: 40 wanted of 32, a count must be 1 to 32"),
        (0, ValueError, "heads: 0 wanted of 32"),
        (-1, ValueError, "heads: -1 wanted of 32"),
        (0.0, ValueError, "heads: 0.0 wanted, a share must be above 0 and at most 1"),
        (1.5, ValueError, "heads: 1.5 wanted, a share"),
        (float("nan"), ValueError, "heads: nan wanted, a share"),
        (True, TypeError, r"heads: a count \(int\) or a share \(float\) wanted, got bool True"),
        ("0.1", TypeError, "heads: .* got str '0.1'"),
        (None, TypeError, "heads: .* got NoneType None"),
    ],
)
def test_budget_refuses(value, error, message):
    with pytest.raises(error, match=message):
        budget(value, 32, "heads")


def test_budget_refuses_a_block_that_does_not_fit():
    with pytest.raises(ValueError, match="channels: blocks of 64 wanted, there are 40 in all"):
        budget(0.5, 40, "channels", 64)


ATTENTION = [f"model.layers.{i}.self_attn" for i in range(2)]
MLP = [f"model.layers.{i}.mlp" for i in range(2)]
HEADS = {
    ATTENTION[0]: torch.tensor([5.0, 1.0, 3.0, 3.0]),
    ATTENTION[1]: torch.tensor([0.5, 4.0, 3.0, 0.1]),
}
CHANNELS = {
    MLP[0]: torch.tensor([9.0, 8.0, 7.0, 6.0, 0.0]),
    MLP[1]: torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
}


def ranked(scores, counts, **options) -> dict:
    chosen = ranked_units(scores, dict(zip(scores, counts, strict=False)), **options)
    assert all((units.dtype, units.ndim) == (torch.int32, 1) for units in chosen.values())
    return {name: units.tolist() for name, units in chosen.items()}


@pytest.mark.parametrize(
    "scores, counts, options, expected",
    [
        (HEADS, (2, 3), {}, {ATTENTION[0]: [0, 2], ATTENTION[1]: [0, 1, 2]}),
        (HEADS, (2, 1), dict(largest=False), {ATTENTION[0]: [1, 2], ATTENTION[1]: [3]}),
        (HEADS, (4, 4), {}, {ATTENTION[0]: [0, 1, 2, 3], ATTENTION[1]: [0, 1, 2, 3]}),
        (HEADS, (2,), {}, {ATTENTION[0]: [0, 2]}),  # what has no count is left alone
        # 5, 4, and of three 3s the first, then the second
        (HEADS, (1, 2), dict(scope="global"), {ATTENTION[0]: [0, 2], ATTENTION[1]: [1]}),
        (HEADS, (2, 2), dict(scope="global"), {ATTENTION[0]: [0, 2, 3], ATTENTION[1]: [1]}),
        (HEADS, (1, 1), dict(scope="global", largest=False), {ATTENTION[1]: [0, 3]}),
        (CHANNELS, (2, 2), dict(scope="global"), {MLP[0]: [0, 1, 2, 3]}),
        # heads compete with heads, channels with channels
        (
            {**CHANNELS, **HEADS},
            (1, 1, 1, 1),
            dict(scope="global"),
            {MLP[0]: [0, 1], ATTENTION[0]: [0], ATTENTION[1]: [1]},
        ),
        # the fifth channel belongs to no whole block
        (CHANNELS, (2, 2), dict(block=2), {MLP[0]: [0, 1], MLP[1]: [2, 3]}),
        (CHANNELS, (2, 2), dict(block=2, largest=False), {MLP[0]: [2, 3], MLP[1]: [0, 1]}),
        (CHANNELS, (2, 2), dict(block=2, scope="global"), {MLP[0]: [0, 1, 2, 3]}),
    ],
)
def test_ranked_units(scores, counts, options, expected):
    chosen = ranked(scores, counts, **options)
    assert chosen == expected
    assert list(chosen) == list(expected)


def test_a_block_counts_by_its_root_of_the_sum_of_squares():
    scores = {"mlp": torch.tensor([5.0, 5.0, 8.0, 0.0, 6.0, 4.0])}  # 50, 64, 52; sums 10, 8, 10
    assert ranked(scores, [2], block=2) == {"mlp": [2, 3]}
    assert ranked(scores, [4], block=2) == {"mlp": [2, 3, 4, 5]}


def test_ranked_units_takes_as_many_of_each_expert():
    values = {"moe": torch.tensor([3.0, 1.0, 2.0, 0.0, 9.0, 8.0, 7.0, 6.0, 0.0, 0.0, 1.0, 5.0])}
    options = dict(counts={"moe": 2}, num_experts={"moe": 3, "other": 2})
    assert ranked_units(values, **options)["moe"].tolist() == [0, 2, 4, 5, 10, 11]
    smallest = ranked_units(values, largest=False, **options)["moe"]
    assert smallest.tolist() == [1, 3, 6, 7, 8, 9] and smallest.dtype == torch.int32
    runs = ranked_units(values, block=2, **options)["moe"]
    assert runs.tolist() == [0, 1, 4, 5, 10, 11]
    with pytest.raises(ValueError, match="'global' cannot be had for moe: each of its 3 experts"):
        ranked_units(values, scope="global", **options)


def test_ranked_units_breaks_ties_by_position():
    scores = {name: torch.ones(1000) for name in MLP}
    for largest in (True, False):
        expected = {name: list(range(300)) for name in MLP}
        assert ranked(scores, (300, 300), largest=largest) == expected
        chosen = ranked(scores, (600, 600), largest=largest, scope="global")
        assert chosen == {MLP[0]: list(range(1000)), MLP[1]: list(range(200))}


@pytest.mark.parametrize(
    "scores, counts, options, message",
    [
        (HEADS, {MLP[0]: 1}, {}, f"counts: structures with scores wanted, got {MLP[0]}"),
        (HEADS, {ATTENTION[1]: 5}, {}, f"{ATTENTION[1]}: 5 units wanted of 4 in blocks of 1"),
        (HEADS, {ATTENTION[1]: 0}, {}, f"{ATTENTION[1]}: 0 units wanted of 4"),
        (CHANNELS, {MLP[0]: 3}, dict(block=2), "3 units wanted of 5 in blocks of 2"),
        (HEADS, {ATTENTION[0]: 1}, dict(scope="model"), "scope must be one of 'layer', 'global'"),
        (
            {MLP[0]: torch.tensor([1.0, math.nan])},
            {MLP[0]: 1},
            {},
            f"scores of {MLP[0]}: finite numbers wanted",
        ),
    ],
)
def test_ranked_units_refuses(scores, counts, options, message):
    with pytest.raises(ValueError, match=message):
        ranked_units(scores, counts, **options)


def test_random_scores():
    """They follow from seed, name and size; ranked, they are S2FT-R with a budget for all."""
    sizes = dict.fromkeys(MLP, 500)
    state = torch.get_rng_state()
    scores = random_scores(3, sizes)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(random_scores(3, {MLP[1]: 500})[MLP[1]], scores[MLP[1]])
    assert not torch.equal(random_scores(4, sizes)[MLP[0]], scores[MLP[0]])
    assert not torch.equal(scores[MLP[0]], scores[MLP[1]])
    assert all(0 <= value.min() and value.max() < 1 for value in scores.values())
    chosen = ranked_units(scores, dict.fromkeys(MLP, 100), scope="global")
    counts = [len(chosen[name]) for name in MLP]
    assert sum(counts) == 200 and min(counts) > 60 and counts[0] != counts[1]
