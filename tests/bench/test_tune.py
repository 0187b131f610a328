"""The tuner, rehearsed at toy size in the interpreter, and the table that it writes."""

import json
from pathlib import Path

import pytest
import torch

from bench.kernels import candidates, laps, trial, tune
from bench.kernels.candidates import PEERS, Problem
from bench.measure import machine
from s2kernels import kernels
from s2kernels.kernels import tuned

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a rehearsal, where there is no GPU to measure"
)


def _toy(folder: Path, *options: str) -> int:
    table = folder / "tuned.json"
    paths = ["--results", str(folder), "--table", str(table)]
    return tune.main(["--toy", *paths, *options])


def _entries(folder: Path) -> list[dict]:
    text = (folder / "cpu" / "tune.json").read_text()
    return json.loads(text)["benchmarks"]


@pytest.mark.slow
@needs_interpreter
def test_rehearsal(tmp_path, monkeypatch, capsys):
    ops = ["--ops", "linear", "slice_grad"]
    assert _toy(tmp_path, *ops) == 0
    entries = _entries(tmp_path)
    assert len(entries) == 4
    for entry in entries:
        info = entry["extra_info"]
        assert not info["refused"]
        tried = candidates.candidates(Problem(info["op"], (64, 48), info["tokens"], None), toy=True)
        assert info["launch"] in tried
        assert info["wins"] == trial.below_one(info["ratio_to_torch"])
    launch, faster = tuned.read(tmp_path / "tuned.json")
    infos = [entry["extra_info"] for entry in entries]
    assert launch == {
        ("sm_90", op, "half"): {
            (64, 48): {i["tokens"]: i["launch"] for i in infos if i["op"] == op}
        }
        for op in ("linear", "slice_grad")
    }
    # As a rule none: an interpreter is no match for a BLAS, but for one that was kept waiting.
    assert bool(faster) == any(info["op"] == "linear" and info["wins"] for info in infos)
    assert "linear float16 64x48 M=32: " in capsys.readouterr().out

    # Again: nothing is left to measure.
    monkeypatch.setattr(tune, "measure", None)
    assert _toy(tmp_path, *ops) == 0
    assert _entries(tmp_path) == entries


@needs_interpreter
def test_goes_on_where_the_budget_ended(tmp_path, monkeypatch, capsys):
    now, measured = [100.0], []

    def measure(problem, *args):
        now[0] += 10
        measured.append(problem.name)
        return trial.entry(problem, {"median": 1.0}, **_info(op=problem.op))

    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(machine, "source_hash", lambda: "s")
    short = ["--ops", "linear", "--budget-s", "9"]
    assert _toy(tmp_path, *short) == 0
    assert "the 9 s are spent: the same command" in capsys.readouterr().out
    first = measured.pop()
    assert _toy(tmp_path, *short) == 0
    assert len(measured) == 1 and first not in measured
    monkeypatch.setattr(machine, "source_hash", lambda: "other kernels")
    measured.clear()
    assert _toy(tmp_path, *short) == 0
    assert measured == [first]  # again


@needs_interpreter
def test_wrong_results_are_told(tmp_path, monkeypatch, capsys):
    real = kernels.linear

    def broken(x, weight):
        y = real(x, weight)
        return y + 1 if tuned.LAUNCH["sm_90", "linear", "half"][64, 48][x.shape[0]] else y

    monkeypatch.setattr(kernels, "linear", broken)
    assert _toy(tmp_path, "--ops", "linear") == 1
    assert "WRONG OR FAILED" in capsys.readouterr().out
    for entry in _entries(tmp_path):
        assert entry["extra_info"]["launch"] == {}
        assert all(refused["wrong"] for refused in entry["extra_info"]["refused"])


@needs_interpreter
def test_a_launch_that_does_not_compile_leaves_the_others(tmp_path, monkeypatch, capsys):
    def fails(x, weight):
        if tuned.LAUNCH["sm_90", "linear", "half"][64, 48][x.shape[0]]:
            raise RuntimeError("PassManager::run failed\nand where")
        return PEERS["linear"](x, weight)

    monkeypatch.setattr(kernels, "linear", fails)
    assert _toy(tmp_path, "--ops", "linear") == 1
    said = capsys.readouterr().out
    assert "M=32, {'BLOCK_M': 16," in said and ": RuntimeError: PassManager::run failed\n" in said
    infos = [entry["extra_info"] for entry in _entries(tmp_path)]
    assert [info["launch"] for info in infos] == [{}, {}]
    assert [len(info["refused"]) for info in infos] == [2, 2]


@needs_interpreter
def test_a_problem_that_fails_comes_last_the_next_time(tmp_path, monkeypatch, capsys):
    tried = []

    def measure(problem, *args):
        tried.append(problem.tokens)
        if problem.tokens == 32:
            raise ValueError("of this size")
        return trial.entry(problem, {"median": 1.0}, **_info(tokens=problem.tokens))

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "problems", lambda *_: candidates.problems(["linear"], True)[:1])
    assert _toy(tmp_path) == 1
    assert "linear float16 64x48 M=32: ValueError: of this size" in capsys.readouterr().out
    monkeypatch.setattr(tune, "problems", candidates.problems)
    # What is not measured stays so, and what failed has failed.
    assert _toy(tmp_path, "--ops", "linear", "--budget-s", "-1") == 1
    assert [entry["stats"] for entry in _entries(tmp_path)] == [None]
    assert _toy(tmp_path, "--ops", "linear") == 1
    assert tried == [32, 80, 32]
    assert [entry["stats"] for entry in _entries(tmp_path)] == [None, {"median": 1.0}]
    launch, _ = tuned.read(tmp_path / "tuned.json")
    assert launch == {("sm_90", "linear", "half"): {(8, 4): {80: {}}}}


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
    assert (tmp_path / "tuned.json").exists()


@pytest.mark.parametrize("op", PEERS)
def test_every_op_agrees_with_torch(op, device):
    """What is compared is equal: a comparison of times means something."""
    problem = Problem(op, (48, 32), 24, torch.float16)
    arguments = problem.operands(device)
    trial.check(getattr(kernels, op)(*arguments), trial.allowance(op, arguments))


def test_a_check_sees_a_wrong_result_and_a_nan():
    exact = torch.ones(2, dtype=torch.float64)
    trial.check(exact.float(), [(exact, 1e-6)])
    with pytest.raises(AssertionError, match=r"difference: 0\.5 .*1e-06 allowed"):
        trial.check((exact.float(), exact.float() * 1.5), [(exact, 1e-6)] * 2)
    with pytest.raises(AssertionError, match="nan"):
        trial.check(exact.float() * float("nan"), [(exact, 1e-6)])


def test_the_default_stays_unless_it_lost_by_more_than_the_spread():
    assert trial.choose({"0": [1.0] * 4, "1": [0.9] * 4, "2": [0.8] * 4}) == "2"
    assert trial.choose({"0": [1.0, 1.1, 0.9, 1.0], "1": [0.9, 1.2, 0.8, 0.99]}) == "0"
    assert trial.choose({"1": [0.9] * 4}) == "1"


def _info(tokens=64, wins=False, launch=None, sizes=(8, 4), op="linear"):
    return {
        "device": "GPU",
        "arch": "sm_90",
        "op": op,
        "sizes": list(sizes),
        "tokens": tokens,
        "dtype": "bfloat16",
        "launch": launch or {},
        "wins": wins,
        "refused": [],
        "ratio_to_torch": {"median": 1.0, "q1": 1.0, "q3": 1.0},
    }


def test_a_win_reaches_from_one_measured_win_to_the_next(tmp_path):
    wins = {64: True, 96: True, 128: False, 512: True, 1024: True, 2048: True}
    infos = [_info(tokens, won) for tokens, won in wins.items()]
    infos += [_info(64, False, sizes=(4, 4)), _info(64, True, op="slice_grad")]
    tune.write_table(tmp_path / "t.json", infos[::-1])
    _, faster = tuned.read(tmp_path / "t.json")
    assert faster == {("GPU", "linear", "bfloat16"): {(8, 4): ((64, 96), (512, 2048))}}


def test_rows_that_were_not_measured_again_stay(tmp_path):
    launch, path = {"BLOCK_M": 128, "num_warps": 8}, tmp_path / "t.json"
    other = _info(64, True, launch, sizes=(4, 4)) | {"arch": "sm_100", "device": "other"}
    first = [_info(512, True, launch), _info(64, True, launch, op="linear_dx"), other]
    tune.write_table(path, first)
    again = tmp_path / "again.json"
    tune.write_table(again, first[::-1])
    assert again.read_text() == path.read_text()
    tune.write_table(path, [_info(512, False)])
    found, faster = tuned.read(path)
    assert found == {
        ("sm_90", "linear", "half"): {(8, 4): {512: {}}},
        ("sm_90", "linear_dx", "half"): {(8, 4): {64: launch}},
        ("sm_100", "linear", "half"): {(4, 4): {64: launch}},
    }
    assert faster.keys() == {("GPU", "linear_dx", "bfloat16"), ("other", "linear", "bfloat16")}


def test_the_committed_table_is_written_as_the_tuner_writes(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(tuned.PATH.read_text())
    tune.write_table(path, [])
    assert path.read_text() == tuned.PATH.read_text()


def test_what_s2ft_trains_comes_first():
    listed = candidates.problems(list(PEERS), toy=False)
    slices = [problem for problem in listed if problem.op == "slice_grad"]
    assert listed[: len(slices)] == slices and len(set(listed)) == len(listed)
    # of LoRA's rank 16: a head of o_proj, and so many channels of down_proj
    first = [problem.sizes for problem in slices[:15:3]]
    assert first == [(4096, 128), (4096, 176), (5120, 128), (5120, 176), (4096, 192)]
    assert {problem.tokens for problem in slices} == {512, 2048, 4096}
    assert {(22016, 4096), (8192, 4096)} <= set(candidates.weight_sizes("linear_dx"))


class Gpu:
    """CUDA's clock and graphs, on which a launch takes 3 units and a call from Python 100 more."""

    def __init__(self, monkeypatch):
        self.now, self.capturing, self.calls = 0, None, []
        monkeypatch.setattr(laps.timing, "laps", self.laps)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)

    def launch(self, operands):
        self.calls.append(operands)
        if self.capturing is None:
            self.now += 103
        else:
            self.capturing.append(operands)

    def laps(self, parts, device):
        starts = []
        for part in parts:
            starts.append(self.now)
            part()
        return [end - start for start, end in zip(starts, [*starts[1:], self.now], strict=True)]


class Graph:
    def __init__(self, gpu):
        self.gpu, self.launches = gpu, []

    def __enter__(self):
        self.gpu.capturing = self.launches

    def __exit__(self, *error):
        self.gpu.capturing = None

    def replay(self):
        self.gpu.now += 3 * len(self.launches)


def test_a_lap_is_a_graph_over_operands_in_turn(monkeypatch):
    gpu, cuda = Gpu(monkeypatch), torch.device("cuda")
    lap = laps.lap(gpu.launch, [("a",), ("b",), ("c",)], 7, cuda)
    assert gpu.calls == list("abcabca") * 2  # to warm up, and captured
    both = {"x": lap, "y": lambda: setattr(gpu, "now", gpu.now + 5)}
    found = list(laps.timing.interleave(both, 4, cuda))
    assert found == [{"x": 7 * 3, "y": 5}] * 4  # no call from Python is in it
    assert len(gpu.calls) == 14
    waiting = laps.lap(gpu.launch, [("a",)], 2, cuda, waits=True)
    assert laps.timing.laps([waiting], cuda) == [2 * 103]


def test_operands_fill_more_than_the_cache():
    large = torch.empty(2**26, dtype=torch.uint8, device="meta")
    made = laps.operand_sets(lambda: (large.clone(), 1), torch.device("cuda"))
    assert len(made) == 4 and len({id(each[0]) for each in made}) == 4
    assert len(laps.operand_sets(lambda: (large,), torch.device("cpu"))) == 1
