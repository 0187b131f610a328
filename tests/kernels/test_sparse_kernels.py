"""The ops of scattered entries in Triton against plain torch, and what they allocate."""

import importlib

import pytest
import torch
from layouts import LAYOUTS, contiguous
from numerics import assert_as_accurate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2kernels import kernels, reference
from s2kernels.kernels import target
from s2kernels.plan import TILE, tile_plan

# Not the attributes of the package: those are the launchers of the same names.
grad_module = importlib.import_module("s2kernels.kernels.sparse_grad")
tile_module = importlib.import_module("s2kernels.kernels.sparse_tile")
search_module = importlib.import_module("s2kernels.kernels.score_search")

# (M, N, K, k): aligned, as the copy engine wants it; past one tile and odd in every dimension; all
# entries of more than one tile; one of everything; no tokens.
SHAPES = [(64, 128, 512, 900), (37, 137, 301, 700), (5, 130, 259, 130 * 259), (1, 1, 1, 1)]
SHAPES.append((0, 9, 7, 5))


def _index(size, k, device):
    return torch.randperm(size)[:k].sort().values.int().to(device)


def _operands(shape, dtype, device, layout=contiguous):
    M, N, K, k = shape
    dy = layout(torch.randn(M, N, device=device).to(dtype))
    x = layout(torch.randn(M, K, device=device).to(dtype))
    return dy, x, _index(N * K, k, device)


def _check_grad(dy, x, index, plan=None, grad=None):
    exact = reference.sparse_grad(
        dy.double(), x.double(), index, None, None if grad is None else grad.double()
    )
    eager = reference.sparse_grad(dy, x, index, None, None if grad is None else grad.clone())
    actual = kernels.sparse_grad(dy, x, index, plan, grad)
    assert grad is None or actual is grad
    assert_as_accurate(actual, exact, eager)


@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_grad(shape, dtype, device):
    dy, x, index = _operands(shape, dtype, device)
    _check_grad(dy, x, index)
    _check_grad(dy, x, index, tile_plan(index, shape[1:3]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_grad_of_layouts(layout, dtype, device):
    _check_grad(*_operands((37, 45, 51, 100), dtype, device, layout))


def test_copy_engine_serves_aligned_halves_alone(monkeypatch, device):
    told, takes = [], tile_module.takes_descriptors

    def spy(*matrices):
        told.append(takes(*matrices))
        return told[-1]

    monkeypatch.setattr(tile_module, "takes_descriptors", spy)
    for shape in ((20, 72, 264, 300), (20, 72, 263, 300)):
        _check_grad(*_operands(shape, torch.float16, device))
    assert told == [target.chip(device).arch in ("sm_90", "sm_100"), False]


@pytest.mark.parametrize("ops", [reference, kernels], ids=["torch", "triton"])
def test_sparse_grad_of_positions_beyond_32_bits(ops, device):
    N, K = 70000, 40000
    dy, x = torch.randn(1, N, device=device), torch.randn(1, K, device=device)
    rows = torch.tensor([0, 3, 60000, 60001, N - 1], device=device)
    cols = torch.tensor([K - 1, 0, 5, 39000, K - 1], device=device)
    grad = ops.sparse_grad(dy, x, rows * K + cols)
    assert grad.equal(dy[0, rows] * x[0, cols])


def _splits(shape, index, device):
    tiles = len(tile_plan(index, shape[1:3]).tiles)
    return grad_module._split(shape[0], tiles, target.num_sms(device))[0]


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_tokens", [0, 30, 300])
def test_sparse_grad_adds_into_grad(num_tokens, grad_dtype, dtype, device):
    shape = (num_tokens, 35, 33, 90)
    dy, x, index = _operands(shape, dtype, device)
    assert (_splits(shape, index, device) > 1) == (num_tokens == 300)
    buffer = torch.randn(2 * 90, device=device).to(grad_dtype)
    rest = buffer[1::2].clone()
    _check_grad(dy, x, index, None, buffer[::2])
    assert buffer[1::2].equal(rest)


def test_sparse_grad_is_bit_equal_when_run_twice(dtype, device):
    dy, x, index = _operands((300, 145, 51, 900), dtype, device)
    first = kernels.sparse_grad(dy, x, index)
    assert kernels.sparse_grad(dy, x, index).equal(first)


@pytest.mark.parametrize("tiles", [0, 1, 7, 132, 172, 5000])
@pytest.mark.parametrize("num_tokens", [0, 1, 255, 512, 8191])
def test_split_covers_the_tokens_once(num_tokens, tiles):
    splits, tokens = grad_module._split(num_tokens, tiles, programs=132)
    assert tokens % 64 == 0
    assert splits * tokens >= num_tokens > (splits - 1) * tokens or num_tokens == 0
    assert splits == 1 or (splits <= grad_module.MAX_SPLITS and tiles < 5000)


def test_tiles_without_entries_are_not_computed(device):
    """NaN in the operands of every other tile of the weight changes nothing."""
    dy, x, _ = _operands((9, 300, 600, 1), torch.float32, device)
    index = torch.tensor([0, 5, 100 * 600 + 255], dtype=torch.int32, device=device)
    expected = kernels.sparse_grad(dy, x, index)
    dy[:, 128:], x[:, 256:] = float("nan"), float("nan")
    assert kernels.sparse_grad(dy, x, index).equal(expected)


def _integers(M, N, K, dtype, device, levels=3):
    """Of which every product is exact in fp16, and many are equal."""
    dy = torch.randint(-levels, levels + 1, (M, N), device=device).to(dtype)
    return dy, torch.randint(-1, 2, (M, K), device=device).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES, (3, 70, 140, 70 * 140 - 1)])
def test_growth_candidates(shape, dtype, device):
    M, N, K, k = shape
    dy, x = _integers(M, N, K, dtype, device)
    found = kernels.growth_candidates(dy, x, k)
    assert found.dtype == torch.int32
    assert found.equal(reference.growth_candidates(dy, x, k))


def test_growth_candidates_take_nan_first(device):
    dy, x = _integers(4, 70, 140, torch.float32, device)
    dy[0, 17] = float("nan")
    x[1, 99] = float("inf")
    expected = reference.growth_candidates(dy, x, 200)
    assert set(range(17 * 140, 18 * 140)) <= set(expected.tolist())
    assert kernels.growth_candidates(dy, x, 200).equal(expected)


@pytest.fixture
def no_slack(monkeypatch):
    """Let nothing be collected but what is asked for, twice; returns the passes over the tiles."""
    passes = []
    find = search_module._find
    monkeypatch.setattr(search_module, "SLACK", 0)
    monkeypatch.setattr(search_module, "_find", lambda *args: passes.append(args) or find(*args))
    return passes


def test_growth_candidates_among_many_equal_ones(no_slack, monkeypatch, device):
    """All scores are 0 or 1, and there are more rows than one digit counts."""
    monkeypatch.setattr(search_module, "DIGIT_BITS", 5)
    dy, x = torch.zeros(1, 90, device=device), torch.ones(1, 3, device=device)
    dy[:, 5:85] = 1
    found = kernels.growth_candidates(dy, x, 100)
    assert found.tolist() == list(range(15, 115))
    assert len(no_slack) == 2


def test_growth_candidates_go_through_all_digits(no_slack, device):
    """Scores that agree in all but the lowest bits."""
    dy = (1 + torch.arange(70, device=device) * 2.0**-23)[None]
    found = kernels.growth_candidates(dy, torch.ones(1, 1, device=device), 5)
    assert found.tolist() == [65, 66, 67, 68, 69]


@pytest.mark.parametrize("k", [1, 300])
def test_sm3_update(k, device):
    row, col = torch.rand(37, device=device), torch.rand(45, device=device)
    grad, index = torch.randn(k, device=device), _index(37 * 45, k, device)
    expected = row.clone(), col.clone()
    nu = reference.sm3_update(*expected, index, grad)
    assert kernels.sm3_update(row, col, index, grad).equal(nu)
    assert row.equal(expected[0]) and col.equal(expected[1])


@pytest.mark.parametrize(
    "shape", [(137, 301, 700, 500, 1000), (20, 30, 60, 540, 3), (1, 2, 1, 1, 2)]
)
def test_sm3_growth(shape, device):
    N, K, num, k, levels = shape
    row = torch.randint(0, levels, (N,), device=device).float()
    col = torch.randint(0, levels, (K,), device=device).float()
    index = _index(N * K, num, device)
    found = kernels.sm3_growth(row, col, index, k)
    assert found.equal(reference.sm3_growth(row, col, index, k))
    assert not torch.isin(found, index).any()


def test_sm3_growth_with_no_active_entry(device):
    row, col = torch.rand(5, device=device), torch.rand(7, device=device)
    index = torch.empty(0, dtype=torch.int32, device=device)
    found = kernels.sm3_growth(row, col, index, 4)
    assert found.equal(torch.outer(row, col).view(-1).topk(4).indices.sort().values.int())


class _Largest(TorchDispatchMode):
    """The most bytes of any tensor that an operator made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.slow
@pytest.mark.parametrize("ops", [reference, kernels], ids=["torch", "triton"])
@pytest.mark.parametrize("op", ["sparse_grad", "growth_candidates", "sm3_growth"])
def test_nothing_of_the_size_of_the_weight_is_allocated(op, ops, monkeypatch, device):
    """The workspace of the kernels is one tile a multiprocessor: on CPU, of the one it is given."""
    if device.type == "cpu":
        monkeypatch.setattr(target, "WITHOUT_GPU", target.Chip("none", "sm_90", 1))
    monkeypatch.setattr(search_module, "SLACK", 0)
    N, K = (132, 260) if device.type == "cpu" else (4096, 8192)
    k = N * K // 50
    dy, x = torch.randn(4, N, device=device), torch.randn(4, K, device=device)
    row, col, index = dy[0].square(), x[0].square(), _index(N * K, k, device)
    arguments = {
        "sparse_grad": (dy, x, index),
        "growth_candidates": (dy, x, k),
        "sm3_growth": (row, col, index, k),
    }[op]
    with _Largest() as largest:
        getattr(ops, op)(*arguments)
    tiles = target.num_sms(device) * TILE[0] * TILE[1] * 4
    assert 0 < largest.nbytes <= max(tiles, 8 * 4 * k)
    assert largest.nbytes < N * K * 4


def test_a_strip_of_a_large_weight_is_a_small_part_of_it():
    N, K = 4096, 1500
    dy, x, index = torch.randn(2, N), torch.randn(2, K), _index(N * K, 500, "cpu")
    with _Largest() as largest:
        reference.sparse_grad(dy, x, index)
    assert largest.nbytes <= 4 * 2**18 < 4 * N * K / 20
