"""The grouped ops: plain torch against a loop in fp64, and Triton against plain torch."""

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, contiguous
from numerics import DTYPES, assert_as_accurate

from s2kernels import backend, grouped, kernels, reference
from s2kernels.groups import BLOCKS, make_groups

OPS = ["grouped_in_", "grouped_out_"]
# tokens of each adapter, its R, tokens of the base model; then N, K
BATCHES = {
    "decode": ([1] * 5, [3, 0, 17, 1, 40], 2, 33, 70),
    "a few": ([2, 16, 5], [9, 20, 64], 3, 70, 45),
    "prefill": ([37, 0, 70], [33, 8, 5], 11, 129, 67),
    "one of all": ([1], [1], 0, 1, 1),
    "no entries": ([2, 1], [0, 0], 1, 5, 6),
    "base alone": ([0, 0], [2, 3], 4, 9, 11),
    "no tokens": ([0], [2], 0, 9, 7),
}


class Problem:
    """y, x, pool and groups; the rows of the pool that no entry names are NaN."""

    def __init__(self, op, batch, dtype, device, layout=contiguous, repeat=False):
        sizes, counts, base, N, K = BATCHES[batch] if isinstance(batch, str) else batch
        M, width = sum(sizes) + base, N if op == "grouped_in_" else K
        channels = K if op == "grouped_in_" else N
        counts = [min(count, channels) for count in counts]
        group = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)] + [-1] * base)
        self.group = group.long()[torch.randperm(M)]
        pool = torch.full((2 * sum(counts) + 3, width), float("nan"), device=device, dtype=dtype)
        free = torch.randperm(len(pool))[: sum(counts)].int()
        self.rows = list(free.split(counts))
        self.channels = [torch.randperm(channels)[:count].int() for count in counts]
        if repeat:  # the last adapter is the first one again, under another group
            self.rows[-1], self.channels[-1] = self.rows[0], self.channels[0]
        for rows in self.rows:
            values = torch.randn(len(rows), width, device=device)
            pool[rows.long().to(device)] = values.to(dtype)
        self.x, self.y, self.pool = (
            layout(t) for t in (self.randn(M, K, pool), self.randn(M, N, pool), pool)
        )
        self.groups = make_groups(self.group, self.rows, self.channels, device)
        self.op = op

    @staticmethod
    def randn(rows, cols, like):
        return torch.randn(rows, cols, device=like.device).to(like.dtype)

    def looped(self, dtype):
        """Token by token, entry by entry."""
        y, x, pool = (tensor.to(dtype, copy=True) for tensor in (self.y, self.x, self.pool))
        for m, g in enumerate(self.group.tolist()):
            if g < 0 or not len(self.rows[g]):
                continue
            vectors = pool[self.rows[g].long().to(pool.device)]
            channels = self.channels[g].long().to(pool.device)
            if self.op == "grouped_in_":
                y[m] += x[m, channels] @ vectors
            else:
                y[m, channels] += vectors @ x[m]
        return y

    def check(self, ops):
        exact, eager = self.looped(torch.float64), self.looped(self.y.dtype)
        before = self.y.clone()
        assert getattr(ops, self.op)(self.y, self.x, self.pool, self.groups) is self.y
        assert_as_accurate(self.y, exact, eager)
        base = (self.group < 0).to(before.device)
        assert torch.equal(self.y[base], before[base])


@pytest.fixture(params=OPS)
def op(request):
    return request.param


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("batch", BATCHES)
def test_grouped(op, batch, impl, dtype, device):
    problem = Problem(op, batch, dtype, device)
    problem.check(backend.select(problem.x, impl))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", ["decode", "a few", "prefill"])
def test_layouts(op, batch, layout, impl, dtype, device):
    problem = Problem(op, batch, dtype, device, layout)
    problem.check(backend.select(problem.x, impl))


@pytest.mark.parametrize("batch", BATCHES)
def test_plain_torch_in_fp64(op, batch):
    problem = Problem(op, batch, torch.float64, "cpu")
    exact = problem.looped(torch.float64)
    actual = getattr(reference, op)(problem.y, problem.x, problem.pool, problem.groups)
    torch.testing.assert_close(actual, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_an_adapter_may_be_in_two_groups(op, impl, device):
    batch = ([3, 1, 2], [7, 4, 7], 1, 20, 30)
    problem = Problem(op, batch, torch.float32, device, repeat=True)
    problem.check(backend.select(problem.x, impl))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_that_follow_each_other(op, impl, device):
    """Tokens and rows in runs: the plain-torch op takes views of them."""
    problem = Problem(op, ([12, 9], [6, 5], 0, 24, 18), torch.float32, device)
    rows = [torch.arange(1, 7, dtype=torch.int32), torch.arange(7, 12, dtype=torch.int32)]
    problem.pool = Problem.randn(*problem.pool.shape, problem.pool)
    problem.rows, problem.group = rows, torch.arange(2).repeat_interleave(torch.tensor([12, 9]))
    problem.groups = make_groups(problem.group, rows, problem.channels, device)
    _, products = problem.groups.parts()
    assert all(isinstance(p.tokens, slice) and isinstance(p.rows, slice) for p in products)
    problem.check(backend.select(problem.x, impl))


@pytest.mark.parametrize("tokens", [[1, 1, 2, 1], [1, 9, 2, 1]])
def test_wide_rows_that_follow_each_other_are_products(tokens, monkeypatch):
    """In-slices of many numbers for few tokens; one group is not wide, one has scattered rows."""
    monkeypatch.setattr("s2kernels.groups.PRODUCT_NUMBERS", 5 * 24)
    problem = Problem("grouped_in_", (tokens, [6, 5, 4, 7], 2, 24, 18), torch.float64, "cpu")
    problem.pool = Problem.randn(*problem.pool.shape, problem.pool)
    runs = [torch.arange(first, first + n, dtype=torch.int32) for first, n in ((1, 6), (7, 5))]
    problem.rows = [*runs, torch.arange(12, 16).int(), torch.randperm(7).int() * 3]
    problem.groups = make_groups(problem.group, problem.rows, problem.channels)
    bags, products = problem.groups.parts(24)
    assert bags is not None and len(products) == 2 and problem.groups.parts()[0] is not None
    problem.check(reference)


def test_without_any_sum_of_rows(monkeypatch):
    monkeypatch.setattr("s2kernels.groups.PRODUCT_NUMBERS", 24)
    problem = Problem("grouped_in_", ([1, 2], [1, 1], 1, 24, 18), torch.float64, "cpu")
    assert problem.groups.parts(24)[0] is None
    problem.check(reference)


def test_without_the_op_of_torch_that_is_not_public(monkeypatch):
    monkeypatch.setattr(grouped, "_ROW_DOTS", None)
    Problem("grouped_out_", "decode", torch.float32, "cpu").check(reference)


def test_kernels_repeat_bit_for_bit(op, dtype, device):
    problem = Problem(op, "a few", dtype, device)
    results = [
        getattr(kernels, op)(problem.y.clone(), problem.x, problem.pool, problem.groups)
        for _ in range(3)
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("largest", "block"), [(1, 1), (2, 16), (16, 16), (17, 64), (200, 64)])
def test_tiles_cover_every_token_once(largest, block):
    group = torch.tensor([0] * largest + [-1] * 3 + [2] * (largest // 2))[
        torch.randperm(largest + 3 + largest // 2)
    ]
    tokens = make_groups(group, [[0], [1], [2]], [[0], [0], [0]]).tokens
    assert tokens.block == block and block in BLOCKS
    seen = []
    for g, first, count in tokens.tiles.tolist():
        assert 1 <= count <= block
        places = tokens.order[first : first + count].long()
        assert bool((group[places] == g).all())
        seen += places.tolist()
    assert sorted(seen) == (group >= 0).nonzero().flatten().tolist()


def test_negative_zero_of_the_base_stays(op, device):
    for impl in ("torch", "triton"):
        problem = Problem(op, ([1, 1], [3, 2], 3, 8, 8), torch.float32, device)
        problem.y.fill_(-0.0)
        base = (problem.group < 0).to(device)
        getattr(backend.select(problem.x, impl), op)(
            problem.y, problem.x, problem.pool, problem.groups
        )
        assert bool(torch.signbit(problem.y[base]).all())


SIZES = st.integers(1, 70)


@settings(max_examples=40)
@given(
    st.sampled_from(OPS),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), max_size=5),
    st.integers(0, 5),
    st.tuples(SIZES, SIZES),
    st.sampled_from(LAYOUTS),
    st.sampled_from(DTYPES),
    st.sampled_from(["torch", "triton"]),
    st.integers(0, 2**16),
)
def test_drawn_batches(op, groups, base, widths, layout, dtype, impl, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = [size for size, _ in groups], [count for _, count in groups], base, *widths
    problem = Problem(op, batch, dtype, device, layout)
    problem.check(backend.select(problem.x, impl))
