"""Rows of the pool: handed out once, in runs, and given back."""

import random

import pytest
import torch

from s2kernels.serve.pool import RowPool


def pool(num_rows=20, width=3):
    return RowPool(width, num_rows, torch.float32, "cpu")


def flat(runs):
    return [row for run in runs for row in run]


def test_one_run_where_there_is_one():
    rows = pool()
    first, second, third = (rows.allocate(n) for n in (5, 4, 6))
    assert [len(runs) for runs in (first, second, third)] == [1, 1, 1]
    assert rows.num_free == 5
    rows.free(second)
    assert rows.allocate(4) == second  # the shortest that holds them, and not the end of the pool
    rows.free(second)
    runs = rows.allocate(9)  # of two runs, with nothing left
    assert sorted(flat(runs)) == [5, 6, 7, 8, 15, 16, 17, 18, 19]
    assert rows.num_free == 0 and rows.allocate(1) is None


def test_no_rows_for_nothing_and_none_for_too_many():
    rows = pool(4)
    assert rows.allocate(0) == []
    assert rows.allocate(5) is None
    assert flat(rows.allocate(4)) == [0, 1, 2, 3]


def test_random_traffic_never_gives_a_row_twice():
    draw, rows, held = random.Random(1), pool(300), []
    values = torch.zeros(300)
    for number in range(3000):
        if held and draw.random() < 0.5:
            runs, mark = held.pop(draw.randrange(len(held)))
            assert all(bool((values[list(run)] == mark).all()) for run in runs)
            rows.free(runs)
        else:
            num = draw.randrange(1, 40)
            runs = rows.allocate(num)
            if runs is None:
                assert rows.num_free < num
                continue
            assert len(flat(runs)) == num
            values[flat(runs)] = number
            held.append((runs, number))
        assert rows.num_free == 300 - sum(len(flat(runs)) for runs, _ in held)
    for runs, _ in held:
        rows.free(runs)
    assert rows.allocate(300) == [range(300)]


def test_what_was_not_allocated_cannot_be_freed():
    rows = pool()
    runs = rows.allocate(7)
    rows.free(runs)
    with pytest.raises(ValueError, match="must have been allocated"):
        rows.free(runs)
    assert rows.num_free == 20


def test_rows_hold_what_is_written():
    rows = pool()
    rows.free([rows.allocate(3), rows.allocate(2)][0])
    runs = rows.allocate(18)
    values = torch.randn(18, 3)
    rows.write(runs, values)
    assert torch.equal(rows.rows[flat(runs)], values)


@pytest.mark.parametrize(("width", "num_rows"), [(0, 3), (3, 0), (-1, 2)])
def test_sizes_are_positive(width, num_rows):
    with pytest.raises(ValueError, match="width and num_rows must be positive"):
        RowPool(width, num_rows, torch.float32, "cpu")
