"""Seconds, statistics, the machine, and files of results."""

import json
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import pytest
import torch

from bench.measure import machine, results, timing
from bench.measure.results import Results

CPU = torch.device("cpu")


def test_order_gives_every_method_every_place():
    names, calls = ["a", "b", "c", "d", "e"], []
    steps = {name: partial(calls.append, name) for name in names}
    list(timing.interleave(steps, 2 * len(names), CPU))
    orders = [calls[first : first + 5] for first in range(0, len(calls), 5)]
    assert all(sorted(order) == names for order in orders)
    for place in range(len(names)):
        assert set(Counter(order[place] for order in orders).values()) == {2}


def test_interleave_runs_each_step_once_a_round():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    rounds = list(timing.interleave(steps, 3, torch.device("cpu")))
    assert calls == ["a", "b", "b", "a", "b", "a"]
    assert all(list(times) == ["a", "b"] and min(times.values()) >= 0 for times in rounds)


def test_paired_ratios_do_not_see_a_machine_that_slows_down():
    floor = [1.0, 1.0, 9.0, 1.0]
    ratios = timing.ratio([1.5 * t for t in floor], floor)
    assert ratios["median"] == 1.5 and ratios["iqr"] == 0.0


def test_stats():
    stats = timing.stats([1.0, 2.0, 3.0, 4.0, 10.0])
    assert (stats["min"], stats["max"], stats["mean"], stats["median"]) == (1.0, 10.0, 4.0, 3.0)
    assert (stats["rounds"], stats["iterations"], stats["total"]) == (5, 1, 20.0)
    assert stats["data"] == [1.0, 2.0, 3.0, 4.0, 10.0]


def test_laps_are_the_seconds_of_each_part():
    first, second = timing.laps([lambda: time.sleep(0.02), lambda: time.sleep(0.05)], CPU)
    assert 0.02 <= first < second and second >= 0.05


RESIDENT = """
import platform
from pathlib import Path
import torch
from bench.measure import machine

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("VmRSS:"))

machine.keep_freed_memory()
print(platform.libc_ver()[0])
for release in (False, True):
    torch.ones(2**24)  # 64 MiB, freed at once
    if release:
        machine.release(torch.device("cpu"))
    print(resident())
"""


@pytest.mark.slow
def test_freed_memory_is_kept_and_given_back_between_cases():
    """The pages of a temporary are found once. The next case no longer holds them."""
    command = [sys.executable, "-c", RESIDENT]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=True)
    libc, *resident = done.stdout.split()
    if libc != "glibc":
        pytest.skip("another libc than glibc")
    kept, given_back = map(int, resident)
    assert kept - given_back > 60 * 1024


def test_out_of_memory_is_told_from_other_errors():
    assert machine.out_of_memory(torch.OutOfMemoryError("no room"))
    for words in ("CUDA error", "Triton Error [CUDA]"):
        assert machine.out_of_memory(RuntimeError(f"{words}: out of memory"))
    words = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert machine.out_of_memory(RuntimeError(words))
    assert not machine.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def entry(name: str) -> dict:
    return {"fullname": name, "extra_info": {}}


def test_a_file_of_results_grows_entry_by_entry(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu" / "steps.json"
    first = Results(path, CPU)
    assert not first.has("a")
    first.add(entry("a"))
    again = Results(path, CPU)
    assert again.has("a") and not again.has("b")
    again.add(entry("b"))
    assert list(Results(path, CPU).entries) == ["a", "b"]

    monkeypatch.setattr(machine, "source_hash", lambda: "of other code")
    changed = Results(path, CPU)
    assert not changed.has("a") and list(changed.entries) == ["a", "b"]
    changed.add(entry("a"))
    assert Results(path, CPU).has("a") and not Results(path, CPU).has("b")

    document = json.loads(path.read_text())
    document["machine_info"]["torch"] = "1.0"
    path.write_text(json.dumps(document))
    assert Results(path, CPU).entries == {}
    assert "another machine or of other versions" in capsys.readouterr().out


def test_results_are_written_atomically(tmp_path):
    path = tmp_path / "cpu" / "demo.json"
    results.write(path, [{"name": "first"}], {})
    before = path.read_text()
    with pytest.raises(TypeError):
        results.write(path, [{"name": object()}], {})
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["demo.json"]
    with pytest.raises(ValueError, match="no such file"):
        results.read(tmp_path / "absent.json")
