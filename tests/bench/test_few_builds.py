"""Steps of one model at several sizes with one build of each method, at toy size."""

import json
import warnings

import captured_models
import pytest
import recorded_ops
import torch

from bench.methods import comparable
from bench.steps import few_builds, step
from bench.steps.cases import Case
from bench.steps.few_builds import Files, Job
from bench.steps.model_shapes import TABLE

CPU = torch.device("cpu")


def toy_jobs(toy):
    """S2FT: at two sizes, and captured."""
    sizes = ((1, 8), (2, 8))
    cases = tuple(
        Case(("tokens",), TABLE["toy"], *size, "float32", "s2ft_inplace") for size in sizes
    )
    return [Job(cases), Job(cases[:1], captured=True)]


def entries(folder, name):
    document = json.loads((folder / "cpu" / f"{name}.json").read_text())
    return {entry["params"]["batch"]: entry for entry in document["benchmarks"]}


@pytest.mark.slow
def test_times_at_every_size_bytes_at_the_largest_and_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(few_builds, "jobs", toy_jobs)
    assert few_builds.main(["--toy", "--results", str(tmp_path), "--budget-s", "600"]) == 0
    said = capsys.readouterr().out
    assert "torch's SDPA takes" in said and "the budget is spent" not in said
    found = entries(tmp_path, "steps")
    assert found.keys() == {1, 2} and "bytes" not in found[1]["extra_info"]
    counted = step.count(toy_jobs(True)[0].cases[-1], comparable(TABLE["toy"].config(8)), CPU)
    assert found[2]["extra_info"]["bytes"] == counted["bytes"]
    for entry in [*found.values(), entries(tmp_path, "captured")[1]]:
        extra = entry["extra_info"]
        ratios, steps = extra["ratio_to_floor"]["data"], entry["stats"]["data"]
        floors = extra["floor_seconds"]["data"]
        assert len(steps) >= few_builds.ROUNDS
        assert ratios == pytest.approx([a / b for a, b in zip(steps, floors, strict=True)])
        assert extra["trained_parameters"] == counted["trained_parameters"]
    parts = found[2]["extra_info"]["seconds"]
    assert set(parts) == {"forward", "backward", "optimizer", "periodic"}

    monkeypatch.setattr(few_builds.Bench, "do", None)
    assert few_builds.main(["--toy", "--results", str(tmp_path)]) == 0


@pytest.mark.slow
def test_a_job_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(few_builds, "jobs", toy_jobs)

    def broken(*args):
        raise RuntimeError("of this method")

    monkeypatch.setattr(few_builds, "replayed", broken)
    assert few_builds.main(["--toy", "--results", str(tmp_path)]) == 1
    assert "RuntimeError: of this method" in capsys.readouterr().err
    assert "bytes" in entries(tmp_path, "steps")[2]["extra_info"]
    assert Files(tmp_path, CPU).lack(toy_jobs(True)[1])


def test_nothing_is_begun_that_would_end_too_late(tmp_path, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(few_builds.Bench, "do", lambda self, job: done.append(job))
    assert few_builds.main(["--results", str(tmp_path), "--budget-s", "25"]) == 0
    said = capsys.readouterr().out
    assert "no time for steps of frozen" in said and said.endswith("goes on with the rest\n")
    assert done and all(job.expected_seconds() < 25 for job in done)


@pytest.mark.parametrize("method", ("frozen", "s2ft_inplace"))
def test_a_replay_is_the_step(method, monkeypatch):
    """By a stand-in for a CUDA graph, which does again what was recorded."""
    captured_models.record_steps(monkeypatch, CPU)
    monkeypatch.setattr(few_builds, "Recorder", recorded_ops.Recorder)
    case = Case(("tokens",), TABLE["toy"], 2, 8, "float32", method)
    budget = comparable(TABLE["toy"].config(8))
    batches = step.random_batches(case, CPU)
    first, second = next(batches), next(batches)
    recorded, plain = (step.build(case, budget, CPU, 1e-2) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replay = few_builds.replayed(recorded, first, torch.device("cuda"))
    for _ in range(0 if method == "frozen" else 4):  # which it trained meanwhile
        plain.step(first)
    for batch in (second, first):
        torch.testing.assert_close(replay(batch), plain.step(batch))
