"""The tuner, rehearsed at toy size in the interpreter, and the table that it writes."""

import json
from pathlib import Path

import pytest
import torch

from bench import problems, report, tables, trials, tune
from bench.problems import OPS, Problem
from s2kernels.kernels import tuned

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a rehearsal, where there is no GPU to measure"
)


def _toy(folder: Path, *options: str) -> int:
    table = folder / "tuned.py"
    paths = ["--results", str(folder), "--table", str(table)]
    return tune.main(["--toy", *paths, *options])


def _entries(folder: Path) -> list[dict]:
    text = (folder / "cpu" / "tune.json").read_text()
    return json.loads(text)["benchmarks"]


def _import(path: Path) -> dict:
    names: dict = {}
    exec(compile(path.read_text(), path.name, "exec"), names)
    return names


@needs_interpreter
def test_rehearsal(tmp_path, monkeypatch, capsys):
    ops = ["--ops", "linear", "slice_grad"]
    assert _toy(tmp_path, *ops) == 0
    entries = _entries(tmp_path)
    assert len(entries) == 4
    for entry in entries:
        info = entry["extra_info"]
        assert not info["refused"]
        tried = problems.candidates(Problem(info["op"], (64, 48), info["tokens"], None), toy=True)
        assert list(info["screened"]) == [trials.words(launch) for launch in tried]
        assert info["launch"] in tried
        assert info["wins"] == trials.below_one(info["ratio_to_torch"])
    written = (tmp_path / "tuned.py").read_text()
    assert written == tables.source(tables.measurements(tmp_path))
    # As a rule none: an interpreter is no match for a BLAS, but for one that was kept waiting.
    wins = [entry["extra_info"] for entry in entries if entry["extra_info"]["wins"]]
    faster = _import(tmp_path / "tuned.py")["FASTER"]
    assert bool(faster) == any(info["op"] == "linear" for info in wins)
    assert "linear float16 N=64 K=48 M=32" in capsys.readouterr().out

    # Again: nothing is left to measure.
    monkeypatch.setattr(tune, "measure", None)
    assert _toy(tmp_path, *ops) == 0
    assert _entries(tmp_path) == entries


@needs_interpreter
def test_goes_on_where_the_budget_ended(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(problem, *args):
        if len(measured) == 1:
            raise tune.Late
        measured.append(problem.name)
        return {"name": problem.name, "extra_info": _info(op=problem.op), "stats": {"median": 1.0}}

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "source_hash", lambda: "s")
    assert _toy(tmp_path, "--ops", "linear") == 0
    assert "same command" in capsys.readouterr().out
    first = measured.pop()
    assert _toy(tmp_path, "--ops", "linear") == 0
    assert len(measured) == 1 and first not in measured
    monkeypatch.setattr(tune, "source_hash", lambda: "other kernels")
    assert not tune.measured_before(tmp_path / "cpu" / "tune.json")


@needs_interpreter
def test_wrong_results_are_told(tmp_path, monkeypatch, capsys):
    op = OPS["linear"]
    real = problems.kernels.linear

    def broken(x, weight):
        y = real(x, weight)
        launch = tuned.LAUNCH["sm_90", "linear", "half"][64, 48][x.shape[0]]
        return (y + 1 if launch else y,)

    monkeypatch.setitem(OPS, "linear", problems.Op(op.operands, broken, op.torch, op.exact))
    assert _toy(tmp_path, "--ops", "linear") == 1
    assert "WRONG OR FAILED" in capsys.readouterr().out
    for entry in _entries(tmp_path):
        assert entry["extra_info"]["launch"] == {}
        assert all(refused["wrong"] for refused in entry["extra_info"]["refused"])


@needs_interpreter
def test_a_launch_that_does_not_compile_leaves_the_others(tmp_path, monkeypatch, capsys):
    op = OPS["linear"]

    def fails(x, weight):
        if tuned.LAUNCH["sm_90", "linear", "half"][64, 48][x.shape[0]]:
            raise RuntimeError("PassManager::run failed\nand where")
        return op.torch(x, weight)

    monkeypatch.setitem(OPS, "linear", problems.Op(op.operands, fails, op.torch, op.exact))
    assert _toy(tmp_path, "--ops", "linear") == 1
    said = capsys.readouterr().out
    assert "M=32, {'BLOCK_M': 16," in said and ": RuntimeError: PassManager::run failed\n" in said
    infos = [entry["extra_info"] for entry in _entries(tmp_path)]
    assert [info["launch"] for info in infos] == [{}, {}]
    assert [len(info["refused"]) for info in infos] == [2, 2]


@needs_interpreter
def test_a_problem_that_fails_comes_last_the_next_time(tmp_path, monkeypatch, capsys):
    tried, late = [], []

    def measure(problem, *args):
        tried.append(problem.tokens)
        if problem.tokens in late:
            raise tune.Late
        if problem.tokens == 32:
            raise ValueError("of this size")
        info = _info(tokens=problem.tokens) | {"source": trials.source_hash()}
        return trials.entry(problem, {"median": 1.0}, info)

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "problems", lambda *_: problems.problems(["linear"], True)[:1])
    assert _toy(tmp_path) == 1
    assert "linear float16 N=64 K=48 M=32: ValueError: of this size" in capsys.readouterr().out
    monkeypatch.setattr(tune, "problems", problems.problems)
    late.append(80)  # what is not measured stays so, and what failed has failed
    assert _toy(tmp_path, "--ops", "linear") == 1
    assert [entry["stats"] for entry in _entries(tmp_path)] == [None]
    late.clear()
    assert _toy(tmp_path, "--ops", "linear") == 1
    assert tried == [32, 80, 80, 32]
    assert [entry["stats"] for entry in _entries(tmp_path)] == [None, {"median": 1.0}]
    assert (tmp_path / "tuned.py").read_text() == tables.source([_info(tokens=80)])


@needs_interpreter
def test_a_lost_gpu_ends_the_run_and_not_the_results(tmp_path, monkeypatch):
    def lost(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune, "measure", lost)
    monkeypatch.setattr(tune.timing, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        _toy(tmp_path, "--ops", "linear")
    (entry,) = _entries(tmp_path)
    assert "illegal memory access" in entry["extra_info"]["why"]
    assert (tmp_path / "tuned.py").exists()


def test_nothing_is_measured_by_a_dry_run(tmp_path, capsys):
    assert tune.main(["--dry-run", "--results", str(tmp_path)]) == 0
    assert "slice_grad bfloat16 P=4096 R=256 M=4096: " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("op", OPS)
def test_every_op_agrees_with_torch(op, device):
    """What is compared is equal: a comparison of times means something."""
    problem = Problem(op, (48, 32), 24, torch.float16)
    arguments = trials.operands(problem, OPS[op], device)[0]
    assert trials.errors(OPS[op].triton(*arguments), trials.allowance(OPS[op], arguments)) == ""


def test_errors_see_a_wrong_result_and_a_nan():
    exact = torch.ones(2, dtype=torch.float64)
    assert trials.errors((exact.float(),), [(exact, 1e-6)]) == ""
    assert "0.5" in trials.errors((exact.float() * 1.5,), [(exact, 1e-6)])
    assert "nan" in trials.errors((exact.float() * float("nan"),), [(exact, 1e-6)])


def test_the_default_stays_unless_it_lost_by_more_than_the_spread():
    assert trials.choose({"0": [1.0] * 4, "1": [0.9] * 4, "2": [0.8] * 4}) == "2"
    assert trials.choose({"0": [1.0, 1.1, 0.9, 1.0], "1": [0.9, 1.2, 0.8, 0.99]}) == "0"
    assert trials.choose({"1": [0.9] * 4}) == "1"


def _info(tokens=64, wins=False, launch=None, sizes=(8, 4), op="linear"):
    return {
        "device": "GPU",
        "arch": "sm_90",
        "source": "s",
        "op": op,
        "sizes": list(sizes),
        "tokens": tokens,
        "dtype": "bfloat16",
        "launch": launch or {},
        "wins": wins,
        "refused": [],
        "ratio_to_torch": {"median": 1.0, "q1": 1.0, "q3": 1.0},
        "torch": {"median": 1.0},
    }


def test_a_win_reaches_from_one_measured_win_to_the_next():
    wins = {64: True, 96: True, 128: False, 512: True, 1024: True, 2048: True}
    measured = [_info(tokens, won) for tokens, won in wins.items()]
    measured.append(_info(64, False, sizes=(4, 4)))
    measured.append(_info(64, True, op="slice_grad"))
    assert tables._wins(measured) == {
        ("GPU", "linear", "bfloat16"): {(8, 4): ((64, 96), (512, 2048))}
    }


def test_table_is_what_was_measured_whatever_the_order(tmp_path):
    launch = dict(BLOCK_M=128, BLOCK_C=256, BLOCK_D=64, GROUP_M=8, HALVES=True, PROGRAMS=1)
    launch |= dict(num_warps=8, num_stages=4)
    measured = [
        _info(512, True, launch),
        _info(64),
        _info(64, True, launch, op="linear_dx", sizes=(2, 2)),
        _info(64, sizes=(4, 4)),
    ]
    text = tables.source(measured)
    assert text == tables.source(measured[::-1])
    assert max(map(len, text.splitlines())) <= 100
    path = tmp_path / "tuned.py"
    path.write_text(text)
    names = _import(path)
    assert names["LAUNCH"] == {
        ("sm_90", "linear", "half"): {(8, 4): {64: {}, 512: launch}},
        ("sm_90", "linear_dx", "half"): {(2, 2): {64: launch}},
    }
    assert names["FASTER"]["GPU", "linear", "bfloat16"] == {(8, 4): ((512, 512),)}


def test_committed_table_comes_from_the_committed_measurements():
    assert tune.TABLE.read_text() == tables.source(tables.measurements(report.RESULTS))
