"""The plain-torch ops of scattered entries against the dense computation in fp64, and the plan."""

import pytest
import torch

from s2kernels import reference
from s2kernels.plan import TILE, index_dtype, tile_plan

M, N, K = 7, 40, 33
COUNTS = {"one": 1, "some": 100, "all": N * K}


def _index(k, size=N * K):
    return torch.randperm(size)[:k].sort().values.int()


def _random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def _top(scores, k):
    """Positions of the k largest scores, of equal ones the lowest, by a full sort."""
    return scores.sort(descending=True, stable=True).indices[:k].sort().values


@pytest.mark.parametrize("k", COUNTS.values(), ids=COUNTS)
def test_sparse_grad(k):
    x, dy, weight = _random(M, K), _random(M, N), _random(N, K).requires_grad_()
    torch.nn.functional.linear(x, weight).backward(dy)
    index = _index(k)
    expected = weight.grad.view(-1)[index.long()]
    torch.testing.assert_close(reference.sparse_grad(dy, x, index), expected)
    grad = torch.ones(k, dtype=torch.float64)
    assert reference.sparse_grad(dy, x, index, tile_plan(index, (N, K)), grad) is grad
    torch.testing.assert_close(grad, expected + 1)


@pytest.mark.parametrize("grad_dtype", [None, torch.float32, torch.float16])
def test_sparse_grad_sums_in_fp32(grad_dtype):
    x, dy, index = _random(M, K).half(), _random(M, N).half(), _index(100)
    exact = reference.sparse_grad(dy.double(), x.double(), index)
    grad = None if grad_dtype is None else torch.ones(100, dtype=grad_dtype)
    actual = reference.sparse_grad(dy, x, index, grad=grad)
    assert actual.dtype == (grad_dtype or torch.float32)
    expected = (exact.float() + (grad_dtype is not None)).to(actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=1e-6 if grad is None else 1e-3, atol=1e-5)


@pytest.mark.parametrize("k", COUNTS.values(), ids=COUNTS)
def test_sparse_write(k):
    weight, delta, index = _random(N, K), _random(k), _index(k)
    before, version = weight.clone(), weight._version
    base = weight.view(-1)[index.long()].clone()
    reference.sparse_write([weight], [base], [delta], [index])
    torch.testing.assert_close(weight.view(-1), before.view(-1).index_add(0, index.long(), delta))
    reference.sparse_write([weight], [base], None, [index])
    assert weight.equal(before)
    assert weight._version == version


@pytest.mark.parametrize("levels", [2, 100])
@pytest.mark.parametrize("k", COUNTS.values(), ids=COUNTS)
def test_growth_candidates(k, levels):
    """Integers, so that many entries are equal and none is rounded."""
    dy, x = torch.randint(-levels, levels, (M, N)).double(), torch.randint(-1, 2, (M, K)).double()
    expected = _top((dy.t() @ x).abs().view(-1), k)
    found = reference.growth_candidates(dy, x, k)
    assert found.dtype == torch.int32
    assert found.equal(expected.int())


@pytest.mark.parametrize("shape", [(1, 50), (15, 9), (333, 9), (1000, 5)])
def test_strips_of_every_height_are_put_together(shape):
    N, K = shape
    x, dy, index = _random(M, K), _random(M, N), _index(20, N * K)
    dense = dy.t() @ x
    torch.testing.assert_close(reference.sparse_grad(dy, x, index), dense.view(-1)[index.long()])
    best = _top(dense.abs().view(-1), 20)
    assert reference.growth_candidates(dy, x, 20).equal(best.int())
    scores = torch.outer(dy[0].abs(), x[0].abs()).view(-1)
    scores[index.long()] = -1
    found = reference.sm3_growth(dy[0].abs(), x[0].abs(), index, 20)
    assert found.equal(_top(scores, 20).int())


def test_growth_candidates_of_no_tokens_are_the_first_positions():
    assert reference.growth_candidates(_random(0, N), _random(0, K), 50).equal(
        torch.arange(50).int()
    )


@pytest.mark.parametrize("k", [1, 100])
def test_sm3_update(k):
    row, col, grad, index = _random(N).abs(), _random(K).abs(), _random(k), _index(k)
    dense = torch.zeros(N * K, dtype=torch.float64)
    nu = torch.minimum(row[:, None], col).view(-1)[index.long()] + grad**2
    dense[index.long()] = nu
    dense = dense.view(N, K)
    expected = torch.maximum(row, dense.amax(1)), torch.maximum(col, dense.amax(0))
    torch.testing.assert_close(reference.sm3_update(row, col, index, grad), nu)
    torch.testing.assert_close((row, col), expected)


@pytest.mark.parametrize("levels", [2, 1000])
@pytest.mark.parametrize("k", [1, 100, N * K - 60])
def test_sm3_growth(k, levels):
    row, col = torch.randint(0, levels, (N,)).float(), torch.randint(0, levels, (K,)).float()
    index = _index(60)
    scores = torch.outer(row, col).view(-1)
    scores[index.long()] = -1
    assert reference.sm3_growth(row, col, index, k).equal(_top(scores, k).int())


@pytest.mark.parametrize("shape", [(1, 1), (TILE[0], TILE[1]), (1500, 700)])
@pytest.mark.parametrize("share", [0.001, 1])
def test_tile_plan_lists_every_entry_once_in_its_tile(shape, share):
    size = shape[0] * shape[1]
    index = _index(max(1, int(size * share)), size)
    plan = tile_plan(index, shape)
    assert plan.order.sort().values.equal(torch.arange(len(index)).int())
    assert plan.offsets[0] == 0 and plan.offsets[-1] == len(index)
    assert (plan.offsets[1:] > plan.offsets[:-1]).all()
    assert (plan.tiles[1:] > plan.tiles[:-1]).all()
    tiles = set()
    for first, last in zip(plan.offsets.tolist(), plan.offsets[1:].tolist(), strict=False):
        entries = plan.order[first:last]
        assert (entries[1:] > entries[:-1]).all()
        rows, cols = index[entries] // shape[1] // TILE[0], index[entries] % shape[1] // TILE[1]
        assert (rows == rows[0]).all() and (cols == cols[0]).all()
        tiles.add((int(rows[0]), int(cols[0])))
        places = (
            index[entries] // shape[1] % TILE[0] * TILE[1] + index[entries] % shape[1] % TILE[1]
        )
        assert plan.places[first:last].equal(places.short())
    assert len(tiles) == len(plan.tiles)


def test_index_dtype_is_the_smallest_that_holds_every_position():
    assert index_dtype((2**15, 2**16 - 1)) == torch.int32
    assert index_dtype((2**15, 2**16)) == torch.int64
