"""What of two runs counts as a loss, and the commands that measure."""

import json
import os
import subprocess
import sys

import pytest
import torch
from toy_cases import CEILINGS, fake_entry, measure_at_once, toy_case

from bench import cases, ceilings, compare, report
from bench.record import Record

CPU = torch.device("cpu")


def document(*entries: dict, **machine) -> dict:
    return {"machine_info": report.machine_info(CPU) | machine, "benchmarks": list(entries)}


@pytest.mark.parametrize(
    "after, code, words",
    [
        ({}, 0, "no loss"),
        ({"ratio": 1.22}, 0, "no loss"),
        ({"ratio": 1.3}, 1, "LOSS  figure5/toy/2x8/float32/lora: step / floor 1.200 -> 1.300"),
        ({"ratio": 1.1}, 0, "gain  figure5/toy/2x8/float32/lora: step / floor 1.200 -> 1.100"),
        ({"saved": 1001}, 1, "saved 1,000 bytes -> 1,001 bytes"),
        ({"saved": 900}, 0, "gain"),
        ({"unseen": 8}, 1, "unseen 0 bytes -> 8 bytes"),
        ({"peak": 10_050}, 0, "no loss"),
        ({"peak": 10_200}, 1, "peak 10,000 bytes -> 10,200 bytes"),
        ({"trained_parameters": 6}, 1, "trained parameters 7 -> 6"),
        ({"status": "out of memory"}, 1, "status measured -> out of memory"),
    ],
)
def test_compare(after, code, words, capsys):
    before = fake_entry(toy_case("lora"))
    changed = fake_entry(toy_case("lora"), after.pop("ratio", 1.2))
    extra = changed["extra_info"]
    for name, value in after.items():
        (extra["bytes"] if name in extra["bytes"] else extra)[name] = value
    if extra["status"] != "measured":
        changed["stats"] = None
        del extra["ratio_to_floor"]
    assert compare.compare(document(before), document(changed)) == code
    assert words in capsys.readouterr().out


def test_compare_takes_the_spread_of_noisy_runs_into_account():
    quiet = {"data": [1.19, 1.2, 1.21]}
    noisy = {"data": [0.9, 1.2, 1.5]}
    assert compare.spread(quiet, quiet) < 0.05 < compare.spread(quiet, noisy)


def test_compare_refuses_what_cannot_be_compared(tmp_path):
    entry, other = fake_entry(toy_case("lora")), fake_entry(toy_case("full"))
    with pytest.raises(ValueError, match="reference 'cpu', candidate 'NVIDIA H200'"):
        compare.compare(document(entry), document(entry, gpu="NVIDIA H200"))
    with pytest.raises(ValueError, match="no case is in both"):
        compare.compare(document(entry), document(other))
    with pytest.raises(ValueError, match="no such file"):
        compare.main(["--reference", str(tmp_path / "steps.json")])


def test_compare_measures_the_short_suite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ceilings, "measure", lambda device: CEILINGS)
    quick = measure_at_once(monkeypatch)
    for case in cases.short("cpu"):
        Record(tmp_path / "steps.json", CPU, {}).add(fake_entry(case))
    assert compare.main(["--device", "cpu", "--reference", str(tmp_path / "steps.json")]) == 0
    assert quick == [case.id for case in cases.short("cpu")]
    assert "largest change of a ratio 0.0%" in capsys.readouterr().out


def gpu_sh(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "bench/gpu.sh", *arguments],
        cwd=report.ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


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


@pytest.fixture
def stand_in(tmp_path):
    """A python3 that notes its arguments, and fails on those of which tmp_path/fails has a part."""
    calls, script = tmp_path / "calls", tmp_path / "python3"
    script.write_text(
        f'#!/usr/bin/env bash\necho "$@" >>{calls}\n'
        f'while read -r part; do [[ "$*" != *$part* ]] || exit 1; done <{tmp_path}/fails\n'
    )
    script.chmod(0o755)
    (tmp_path / "fails").touch()
    return script, calls


def test_gpu_sh_runs_tests_ops_and_steps_and_goes_on(tmp_path, stand_in):
    python, calls = str(stand_in[0]), stand_in[1]
    out = str(tmp_path / "out")
    (tmp_path / "fails").write_text("tests/test_swiglu_kernel.py\n")
    assert gpu_sh(out, "--rehearse", PYTHON=python).returncode == 1
    kinds = ["tests/test_swiglu_kernel.py", "bench/bench_ops.py", "bench.laboratory --suite toy"]
    lines = calls.read_text().splitlines()
    assert len(lines) == 3 and all(k in line for k, line in zip(kinds, lines, strict=True))
    assert f"--results {out} --budget-s" in lines[1] and f"--results {out} --budget-s" in lines[2]
    assert "FAILED" in (tmp_path / "out" / "tests.txt").read_text()

    (tmp_path / "fails").write_text("bench_ops\n")
    assert gpu_sh(out, "--rehearse", PYTHON=python).returncode == 1
    assert (tmp_path / "out" / "tests.txt").read_text().endswith("kernel.py passed\n")

    calls.unlink()
    (tmp_path / "fails").write_text("")
    assert gpu_sh(out, "--rehearse", "--budget-s", "100", PYTHON=python).returncode == 0
    assert "test_swiglu" not in (text := calls.read_text())  # passed already
    budgets = [int(line.split("--budget-s ")[1]) for line in text.splitlines()]
    assert len(budgets) == 2 and all(70 <= budget <= 80 for budget in budgets)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "usage"),
        (["out", "--budget-s", "soon"], "usage"),
        (["out", "--abacus"], "usage"),
        (["one", "two"], "usage"),
    ],
)
def test_gpu_sh_rejects_bad_arguments(arguments, words):
    done = gpu_sh(*arguments)
    assert done.returncode == 2 and words in done.stderr


def test_make_knows_the_benchmarks():
    done = subprocess.run(
        ["make", "-n", "-B", "bench", "bench-compare"],
        cwd=report.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for words in ("pytest bench/bench_ops.py", "-m bench.laboratory", "-m bench.compare"):
        assert words in done.stdout
