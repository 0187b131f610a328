"""The ops that are measured, how often each is called, and the file that they go into."""

import json

import pytest
import torch

from bench.kernels import bench_ops, laps
from bench.kernels.ops import CASES, Operands, Sizes
from bench.measure import timing
from bench.steps.work import OPS, Work
from s2kernels import reference

CPU = torch.device("cpu")
CEILINGS = {"gemm_flops": {"float32": 1e11}, "copy_bytes_per_second": 1e10}


@pytest.fixture
def ops(run_pytest, monkeypatch, tmp_path):
    """Measures the ops `which`; returns what pytest said, and the entries there are then."""
    monkeypatch.setattr(laps, "ceilings", lambda device: CEILINGS)

    def run(which: str, *arguments: str) -> tuple[str, list[dict]]:
        file = "bench/kernels/bench_ops.py"
        _, said = run_pytest(file, "-k", which, "--results", str(tmp_path), *arguments)
        document = json.loads((tmp_path / "cpu" / "ops.json").read_text())
        assert document["machine_info"]["ceilings"] == CEILINGS
        return said, document["benchmarks"]

    return run


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU ops have the sizes of models")
def test_ops_are_written_one_by_one_and_not_measured_twice(ops):
    said, entries = ops("slice_write")
    (entry,) = entries
    assert "1 passed" in said and entry["stats"]["median"] > 0
    assert entry["group"].startswith("slice_write ")
    said, entries = ops("slice_write")
    assert "1 results are there already" in said and "passed" not in said and entries == [entry]


def test_ceilings_are_those_of_products_and_of_a_copy(monkeypatch):
    """2 * 1024³ FLOPs, and 2**28 bytes read and written, in half a second each."""
    monkeypatch.setattr(laps, "_median", lambda action, device: 0.5)
    found = laps.ceilings(CPU)
    assert found == {
        "gemm_flops": {"float32": 4 * 1024**3, "bfloat16": 4 * 1024**3},
        "copy_bytes_per_second": 4 * 2**28,
    }


def test_entries_are_sorted_and_drawn_without_a_permutation(monkeypatch):
    monkeypatch.setattr(torch, "randperm", None)
    entries = Operands(CPU, torch.float32).entries(1000, 3000)
    assert entries.dtype == torch.int32
    assert torch.equal(entries, entries.unique()) and 0 <= entries[0] and entries[-1] < 3_000_000
    assert 0.95 * 64_000 < len(entries) <= 64_000


@pytest.mark.parametrize("name", CASES)
def test_every_call_of_the_catalogue_runs(name):
    """By the reference; what it returns and writes is within the bytes that the op moves."""
    case, operands = CASES[name], Operands(CPU, torch.float32, layers=2, experts=2)
    for arguments in case.calls(operands, Sizes("tiny", 66, 520, 540, case.rank or 9)):
        needed = OPS[case.op](*arguments)
        found = getattr(reference, case.op)(*arguments)
        results = found if isinstance(found, tuple) else (found,)
        written = sum(x.numel() * x.element_size() for x in results if x is not None)
        if case.op not in ("slice_linear_", "slice_linear_dx_"):  # which write to a part of it
            assert written <= needed.bytes
        assert needed.flops > 0


@pytest.mark.parametrize("seconds, rounds", [(1e-3, 20), (0.1, 20), (0.5, 6), (9.0, 3)])
def test_slow_ops_run_less_often(seconds, rounds):
    assert bench_ops.rounds(seconds) == rounds


def test_ops_without_tokens_run_once_a_layer():
    listed = bench_ops.cases(bench_ops.CUDA_SIZES)
    assert len(listed) == 14 * 8 + 4 * 2
    assert {name for name, *_ in listed} == {*OPS, "dense_grad"}
    assert {sizes.m for _, case, sizes in listed if not case.by_tokens} == {512}


def test_the_dense_gradient_is_that_of_the_whole_weight():
    sizes = Sizes("tiny", 6, 5, 4, 3)
    (case,) = (case for name, case, _ in bench_ops.cases((sizes,)) if name == "dense_grad")
    ((dy, x),) = case.calls(Operands(CPU, torch.float32), sizes)
    assert torch.equal(reference.linear(dy, x), dy @ x.t())
    assert OPS[case.op](dy, x) == Work(4 * (6 * 5 + 6 * 4 + 5 * 4), 2 * 6 * 5 * 4)


def test_a_lap_counts_as_its_launches(monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter", iter((10.0, 30.0)).__next__)
    clock = timing.Clock(CPU)
    clock.launches = 40
    first = clock()
    assert clock() - first == 0.5
