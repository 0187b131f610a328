"""bench/gpu.sh, with stand-ins for what it runs."""

import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from bench.measure import machine

KERNEL_TEST = "tests/kernels/test_swiglu_kernel.py"


def gpu_sh(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "bench/gpu.sh", *arguments],
        cwd=machine.ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def stand_in(tmp_path):
    """A python3 that notes its arguments, and fails on those of which tmp_path/fails has a part."""
    calls, script = tmp_path / "calls", tmp_path / "python3"
    script.write_text(
        f'#!/usr/bin/env bash\necho "$@" >>{calls}\n'
        f'while read -r part; do [[ "$*" != *$part* ]] || exit 1; done <{tmp_path}/fails\n'
        'echo "said on $PYTHONPATH"\n'
    )
    script.chmod(0o755)
    (tmp_path / "fails").touch()
    return str(script), calls


def fake_python(folder: Path, *lines: str) -> str:
    """A python3 of these lines."""
    script = folder / "python3"
    script.write_text("\n".join(["#!/usr/bin/env bash", *lines]))
    script.chmod(0o755)
    return str(script)


def tried(out: Path) -> list[str]:
    """What tests.txt says of each try, without the hash of the sources."""
    return [line.rpartition(" ")[0] for line in (out / "tests.txt").read_text().splitlines()]


def test_gpu_sh_runs_tests_tuner_ops_and_steps_and_goes_on(tmp_path, stand_in):
    python, calls = stand_in
    out = tmp_path / "out"
    (tmp_path / "fails").write_text(f"{KERNEL_TEST}\n")
    done = gpu_sh(str(out), "--rehearse", PYTHON=python, PYTHONPATH="/wheels")
    assert done.returncode == 1 and f"said on {machine.ROOT}:/wheels\n" in done.stdout
    kinds = [KERNEL_TEST, f"bench.kernels.tune --toy --ops slice_grad --table {out}"]
    kinds += ["bench/kernels/bench_ops.py", "bench/steps --suite toy"]
    lines = calls.read_text().splitlines()
    assert all(k in line for k, line in zip(kinds, lines, strict=True))
    assert all(f"--results {out} --budget-s" in line for line in lines[1:])
    assert tried(out) == [f"{KERNEL_TEST} failed"]
    assert f"== {KERNEL_TEST}\n" in (out / "log.txt").read_text()

    (tmp_path / "fails").write_text("bench_ops\n")
    calls.unlink()
    done = gpu_sh(str(out), "--rehearse", PYTHON=python)
    assert done.returncode == 1 and done.stdout.endswith("not finished: ops \n")
    lines = calls.read_text().splitlines()
    assert all(k in line for k, line in zip(kinds, lines, strict=True))
    assert tried(out)[1:] == [f"{KERNEL_TEST} passed"]

    calls.unlink()
    (tmp_path / "fails").write_text("")
    done = gpu_sh(str(out), "--rehearse", PYTHON=python)
    assert done.returncode == 0 and done.stdout.endswith("== nothing is left\n")
    assert KERNEL_TEST not in (text := calls.read_text())  # passed already
    # of 520 seconds 12 and 20 %, and the rest; of each, less what imports take
    tune, ops, steps = (int(line.split("--budget-s ")[1]) for line in text.splitlines())
    assert tune in (62 - 25, 61 - 25) and ops in (104 - 25, 103 - 25)
    assert 480 <= steps <= 520 - 25

    calls.unlink()
    other = (out / "tests.txt").read_text().replace("passed ", "passed 0")
    (out / "tests.txt").write_text(other)  # of other sources
    assert gpu_sh(str(out), "--rehearse", PYTHON=python).returncode == 0
    assert KERNEL_TEST in calls.read_text()


def test_gpu_sh_ends_in_time_and_says_what_is_left(tmp_path):
    out = tmp_path / "out"
    python = fake_python(tmp_path, "echo begun", "exec sleep 60")
    start = time.monotonic()
    done = gpu_sh(str(out), "--rehearse", "--budget-s", "7", PYTHON=python)
    assert time.monotonic() - start < 10  # the tests take two of the seven seconds
    assert tried(out) == [f"{KERNEL_TEST} unfinished"]
    assert f"== {KERNEL_TEST}\nbegun\n" in (out / "log.txt").read_text()
    left = f"ops steps {KERNEL_TEST} tune"
    assert done.stdout.splitlines()[-1].strip() == f"== run again; not finished: {left}"


def test_gpu_sh_takes_nothing_to_run_for_no_failure(tmp_path):
    """pytest exits with 5 for a file that a missing package has it skip."""
    out = tmp_path / "out"
    python = fake_python(tmp_path, '[[ "$*" != *pytest* ]] || exit 5')
    for _ in range(2):
        done = gpu_sh(str(out), "--rehearse", PYTHON=python)
        assert done.returncode == 0 and done.stdout.endswith("== nothing is left\n")
        assert tried(out) == [f"{KERNEL_TEST} skipped"]


def test_gpu_sh_leaves_one_file_and_goes_on_from_it(tmp_path):
    """However it ends: here it is stopped while the steps are measured."""
    out, began, ended = tmp_path / "out", tmp_path / "began", tmp_path / "ended"
    python = fake_python(
        tmp_path,
        '[[ "$*" == *bench/steps* ]] || exit 0',
        f"trap 'touch {ended}; exit' TERM",
        f"touch {began}",
        "echo of the steps",
        "while true; do sleep 0.1; done",
    )
    command = ["bash", "bench/gpu.sh", str(out), "--rehearse"]
    running = subprocess.Popen(
        command, cwd=machine.ROOT, env=os.environ | {"PYTHON": python}, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not began.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.terminate()
    assert running.wait(timeout=10) == 143 and ended.exists()
    assert sorted(os.listdir(out)) == ["log.txt", "results.tar", "tests.txt"]
    with tarfile.open(out / "results.tar") as tar:
        assert sorted(tar.getnames()) == ["log.txt", "tests.txt"]
        assert b"== steps\nof the steps\n" in tar.extractfile("log.txt").read()

    alone = tmp_path / "alone"
    alone.mkdir()
    (out / "results.tar").rename(alone / "results.tar")
    python = fake_python(tmp_path, f'echo "$@" >>{tmp_path}/again')
    assert gpu_sh(str(alone), "--rehearse", PYTHON=python).returncode == 0
    assert KERNEL_TEST not in (tmp_path / "again").read_text()


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
