import math

import pytest
import torch

from s2kernels.select import budget, random_units

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
