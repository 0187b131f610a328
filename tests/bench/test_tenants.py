"""What stands beside ours in decoding for many tenants computes what it says."""

import copy

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from bench import bench_tenants as tenants
from bench.measure.served import adapter, llama
from s2kernels.serve import Serving

DRAWN = [3, 0, 3, 1, 2, 0]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 2048, (len(DRAWN), 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base():
    return llama().double()


@torch.no_grad()
def logits(model, assign, ids):
    with assign(DRAWN):
        return model(input_ids=ids).logits


def in_fp64(factors):
    return {name: tuple(factor.double() for factor in pair) for name, pair in factors.items()}


def test_grouped_loras_are_those_of_bmm_and_of_products_with_the_weights(base, ids):
    loras = in_fp64(tenants.random_factors(4))
    grouped, gathered = copy.deepcopy(base), copy.deepcopy(base)
    got = logits(grouped, tenants.with_groups(grouped, loras), ids)
    assert (got - logits(gathered, tenants.with_bmm(gathered, loras), ids)).abs().max() < 1e-12
    for row, number in enumerate(DRAWN):
        merged = copy.deepcopy(base)
        for name, (down, up) in loras.items():
            merged.get_submodule(name).weight.data += up[number].t() @ down[number]
        with torch.no_grad():
            alone = merged(input_ids=ids[row : row + 1]).logits[0]
        assert (got[row] - alone).abs().max() < 1e-12


def test_exported_adapters_are_ours(base, ids):
    exported, served = copy.deepcopy(base), Serving(copy.deepcopy(base), pool_bytes=2**24)
    for number in range(4):
        served.register(f"a{number}", adapter(number))
    assign = tenants.with_groups(exported, in_fp64(tenants.exported(4)))
    with torch.no_grad(), served.rows([f"a{number}" for number in DRAWN]):
        ours = served.model(input_ids=ids).logits
    assert (ours - logits(exported, assign, ids)).abs().max() < 1e-12
    with torch.no_grad():
        assert (ours - base(input_ids=ids).logits).abs().max() > 1e-3


@pytest.mark.slow
def test_all_methods_get_the_same_draws():
    popularity = 1 / torch.arange(1, 9, dtype=torch.float64)
    seen: list[list[list[int]]] = []

    def recording(drawn_by_method):
        from contextlib import contextmanager

        @contextmanager
        def assign(drawn):
            drawn_by_method.append(drawn)
            yield

        return assign

    for _ in range(2):
        seen.append([])
        run = tenants.stepping(llama(), recording(seen[-1]), popularity)
        run()
        run()
    assert seen[0] == seen[1] and len(seen[0]) == 3 and seen[0][1] != seen[0][2]
    assert len(seen[0][0]) == tenants.ROWS
