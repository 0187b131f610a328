"""The ops that are measured, how often each is called, and the file that they go into."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import bench_ops, report

CPU = torch.device("cpu")


def ops(folder, which: str, *arguments: str) -> tuple[str, list[dict]]:
    """What pytest says of the ops `which`, and the entries that `folder` then has."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/bench_ops.py", "-q", "-p", "no:cacheprovider"]
        + ["-k", which, "--results", str(folder), *arguments],
        cwd=report.ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    document = json.loads((folder / "cpu" / "ops.json").read_text())
    assert document["machine_info"]["ceilings"]["copy_bytes_per_second"] > 0
    return done.stdout, document["benchmarks"]


def test_ops_are_written_one_by_one_and_not_measured_twice(tmp_path):
    said, entries = ops(tmp_path, "slice_write")
    (entry,) = entries
    assert "1 passed" in said and entry["stats"]["median"] > 0
    assert entry["group"].startswith("slice_write ")
    # What is known already is left out, and the rest comes too late.
    said, entries = ops(tmp_path, "slice_write or swiglu_bwd", "--budget-s", "0")
    assert "1 skipped" in said and "passed" not in said and entries == [entry]


def test_entries_of_ops_are_drawn_where_they_are_wanted(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(check_size(n)))
    operands = bench_ops.Operands(bench_ops.Shape("o", 4, 1000, 3000, 8), CPU)
    assert "entries" not in vars(operands)
    entries = operands.entries
    assert entries is operands.entries and entries.dtype == torch.int32
    assert torch.equal(entries, entries.unique()) and 0 <= entries[0] and entries[-1] < 3_000_000
    assert 0.95 * 64_000 < len(entries) <= 64_000


def check_size(n: int) -> int:
    assert n <= 1000, "a permutation of all entries of the weight"
    return n


@pytest.mark.parametrize(
    "seconds, rounds, iterations", [(1e-3, 20, 10), (0.1, 20, 1), (0.5, 6, 1), (9.0, 3, 1)]
)
def test_slow_ops_run_less_often(seconds, rounds, iterations):
    plan = bench_ops.plan(seconds)
    assert (plan["rounds"], plan["iterations"]) == (rounds, iterations)
    total = (plan["rounds"] + plan["warmup_rounds"]) * plan["iterations"]
    assert total * seconds <= max(bench_ops.SECONDS, 3 * seconds)


def test_ops_without_tokens_run_once_a_layer():
    listed = bench_ops.cases(bench_ops.CUDA_SHAPES)
    assert len(set(listed)) == len(listed) == 11 * 8 + 4 * 2
    assert {op for op, _ in listed} == set(bench_ops.OPS)
    assert {shape.m for op, shape in listed if op in bench_ops.WITHOUT_TOKENS} == {512}
