"""bench/gpu.sh, with stand-ins for what it runs."""

import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench import campaign
from bench.measure import machine

CHECK = "tests/peft/test_bf16_steps.py[inplace-permute-12]"
TESTS = "tests/kernels/test_swiglu_kernel.py[float16]"


def fake_python(folder: Path, *lines: str) -> str:
    """A python3 that runs the campaign, and of what that runs these lines of bash."""
    script = folder / "python3"
    call = f'[[ "$*" != "-m bench.campaign"* ]] || exec {sys.executable} "$@"'
    script.write_text("\n".join(["#!/usr/bin/env bash", call, *lines]))
    script.chmod(0o755)
    return str(script)


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
    calls = tmp_path / "calls"
    python = fake_python(
        tmp_path,
        f'echo "$@" | tr "\\n" " " >>{calls}; echo >>{calls}',
        f'while read -r part; do [[ "$*" != *$part* ]] || exit 1; done <{tmp_path}/fails',
        'echo "said on $PYTHONPATH"',
    )
    (tmp_path / "fails").touch()
    return python, calls


def tried(out: Path) -> list[str]:
    """What tries.txt says of each try, without the hash of the sources."""
    return [line.rpartition(" ")[0] for line in (out / "tries.txt").read_text().splitlines()]


def test_it_takes_the_first_python_that_has_torch(tmp_path):
    for name, lines in (("python3", "exit 1"), ("python", '[[ $1 == -c ]] || echo "called: $@"')):
        script = tmp_path / name
        script.write_text(f"#!/usr/bin/env bash\n{lines}\n")
        script.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = gpu_sh("out", "--plan", PYTHON="", PATH=path)
    assert done.returncode == 0
    assert "called: -m bench.campaign out --plan" in done.stdout


def test_the_parts_in_order_and_what_the_next_call_does(tmp_path, stand_in):
    python, calls = stand_in
    out = tmp_path / "out"
    (tmp_path / "fails").write_text("few_builds\n")
    done = gpu_sh(str(out), "--rehearse", PYTHON=python, PYTHONPATH="/wheels")
    assert done.returncode == 1 and f"said on {machine.ROOT}:/wheels\n" in done.stdout
    kinds = ["-k inplace-permute-12 tests/peft/test_bf16_steps.py"]
    kinds += ["bench.steps.few_builds --toy", "bench.kernels.tune --ops slice_grad"]
    kinds += ["-k float16 tests/kernels/test_swiglu_kernel.py"]
    lines = calls.read_text().splitlines()
    assert all(k in line for k, line in zip(kinds, lines, strict=True))
    # of 570 seconds 320 and 60, less what imports take; what the first part left is theirs, too
    steps, tune = (
        int(line.split(f"--results {out} --budget-s ")[1].split()[0]) for line in lines[1:3]
    )
    assert 370 <= steps <= 410 - 15 and 430 <= tune <= 470 - 15
    assert f"--table {out}/tuned.json" in lines[2]
    assert (out / "tuned.json").read_text() == campaign.TUNED.read_text()
    assert tried(out) == [f"{CHECK} passed", "steps failed", "tune passed", f"{TESTS} passed"]
    assert "== steps: FAILED, 1\n" in (out / "log.txt").read_text()

    calls.unlink()
    (tmp_path / "fails").write_text("swiglu\n")
    text = (out / "tries.txt").read_text().replace(f"{TESTS} passed ", f"{TESTS} passed 0")
    (out / "tries.txt").write_text(text)  # of other sources
    done = gpu_sh(str(out), "--rehearse", "--budget-s", "240", PYTHON=python)
    assert done.returncode == 1 and done.stdout.endswith("== nothing is left\n")
    lines = calls.read_text().splitlines()
    assert all(k in line for k, line in zip([kinds[1], kinds[3]], lines, strict=True))
    assert tried(out)[4:] == ["steps passed", f"{TESTS} failed"]


def test_all_ends_where_steps_are_wrong(tmp_path, stand_in):
    python, calls = stand_in
    (tmp_path / "fails").write_text("bf16_steps\n")
    done = gpu_sh(str(tmp_path / "out"), "--rehearse", PYTHON=python)
    assert done.returncode == 1
    assert done.stdout.endswith("== run again; not finished: steps tune tests\n")
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.slow
def test_it_ends_in_time_and_says_what_is_left(tmp_path):
    out = tmp_path / "out"
    lines = '[[ "$*" != *few_builds* ]] || { echo begun; exec sleep 60; }', "exit 0"
    start = time.monotonic()
    done = gpu_sh(
        *(str(out), "--rehearse", "--budget-s", "20"), PYTHON=fake_python(tmp_path, *lines)
    )
    assert time.monotonic() - start < 40
    assert done.returncode == 0 and tried(out)[0] == f"{CHECK} passed"
    log = (out / "log.txt").read_text()
    assert "== steps\nbegun\n" in log and "== steps: not finished\n" in log
    assert done.stdout.endswith("== run again; not finished: steps\n")


def test_what_its_parts_leave_is_left(tmp_path):
    said = 'case "$*" in *few_builds*) echo the budget is spent;; *tune*) echo the 9 s are spent;;'
    python = fake_python(tmp_path, said, "esac")
    done = gpu_sh(str(tmp_path / "out"), "--rehearse", PYTHON=python)
    assert done.returncode == 0
    assert done.stdout.endswith("== run again; not finished: steps tune\n")


def test_nothing_to_run_is_no_failure(tmp_path):
    """pytest exits with 5 for a file that a missing package has it skip. Nothing is done twice."""
    out = tmp_path / "out"
    python = fake_python(tmp_path, '[[ "$*" != *pytest* ]] || exit 5')
    for _ in range(2):
        done = gpu_sh(str(out), "--rehearse", PYTHON=python)
        assert done.returncode == 0 and done.stdout.endswith("== nothing is left\n")
        assert {f"{CHECK} skipped", f"{TESTS} skipped"} <= set(tried(out))
        assert len(tried(out)) == 4


def test_it_leaves_one_file_and_goes_on_from_it(tmp_path):
    """However it ends: here it is stopped while the steps are measured."""
    out, began, ended = tmp_path / "out", tmp_path / "began", tmp_path / "ended"
    python = fake_python(
        tmp_path,
        '[[ "$*" == *few_builds* ]] || exit 0',
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
    assert running.wait(timeout=20) == 143 and ended.exists()
    files = ["log.txt", "tries.txt", "tuned.json"]
    assert sorted(os.listdir(out)) == sorted([*files, "results.tar"])
    with tarfile.open(out / "results.tar") as tar:
        assert sorted(tar.getnames()) == files
        assert b"== steps\nof the steps\n" in tar.extractfile("log.txt").read()

    alone = tmp_path / "alone"
    alone.mkdir()
    (out / "results.tar").rename(alone / "results.tar")
    python = fake_python(tmp_path, f'echo "$@" >>{tmp_path}/again')
    assert gpu_sh(str(alone), "--rehearse", PYTHON=python).returncode == 0
    assert "bf16_steps" not in (tmp_path / "again").read_text()


def test_launches_that_were_found_are_in_place_for_what_comes_after(tmp_path, monkeypatch):
    """Also those that another machine found: it is OUT_DIR that comes along."""
    package, out = tmp_path / "tuned.json", tmp_path / "out"
    monkeypatch.setattr(campaign, "TUNED", package)
    out.mkdir()
    package.write_text("committed")
    (out / "tuned.json").write_text("found before")
    run, seen = campaign.Run(out, False, time.monotonic(), 570.0), {}

    def do(name, seconds, *arguments, **variables):
        seen[name] = package.read_text()
        if name == "tune":
            (out / "tuned.json").write_text("found now")
        return 0, ""

    monkeypatch.setattr(run, "do", do)
    campaign.campaign(run)
    assert seen["steps"] == seen["tune"] == "found before"
    names = [f"{file}[{words.replace(' ', '-')}]" for file, words in campaign.TESTS]
    assert {seen[name] for name in names} == {"found now"}
    assert all((machine.ROOT / file).is_file() for file, _ in campaign.TESTS + campaign.CHECK)


@pytest.mark.parametrize("module", (campaign, machine), ids=("tests", "steps"))
def test_launches_are_no_part_of_what_is_done_again(module, tmp_path, monkeypatch):
    """Of the sources that decide it, that is: code is."""
    monkeypatch.setattr(module, "ROOT", tmp_path)
    folder = tmp_path / "s2kernels" / "kernels"
    folder.mkdir(parents=True)
    hashes = []
    for name, text in (("slice_grad.py", "1"), ("tuned.json", "2"), ("slice_grad.py", "3")):
        (folder / name).write_text(text)
        found = (
            campaign.sources.__wrapped__()
            if module is campaign
            else machine.source_hash.__wrapped__()
        )
        hashes.append(found)
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_plan_fits_the_budget(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is started
    assert campaign.main(["--plan"]) == 0
    said = capsys.readouterr().out
    at_most = {
        name: float(line.split()[0])
        for line in said.splitlines()
        for name in campaign.SHARES
        if f"  {name}: " in line
    }
    assert at_most == campaign.SHARES and sum(at_most.values()) == campaign.BUDGET
    assert "steps of s2ft_inplace at 1x512, 1x2048, 2x2048" in said
    steps = next(line for line in said.splitlines() if "  steps: " in line)
    assert float(steps.split()[2]) <= campaign.SHARES["steps"]


@pytest.mark.parametrize("arguments", [[], ["out", "--budget-s", "soon"], ["one", "two"]])
def test_bad_arguments(arguments):
    done = gpu_sh(*arguments, PYTHON=sys.executable)
    assert done.returncode == 2 and "usage" in done.stderr
