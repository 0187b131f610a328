"""Cases that the machine was slow for: which they are, and that they are measured again."""

import json
from dataclasses import replace

import pytest
import torch
from toy_cases import CEILINGS, fake_entry, toy_case

from bench import estimate, fresh, measure, quiet, timing
from bench.cases import CHECKPOINTING, FULL_DEPTH
from bench.record import Record
from bench.run import REPEATS, Run

LORA, FULL, DORA = (toy_case(name) for name in ("lora", "full", "dora"))


def names(entries: list[dict]) -> list[str]:
    return [entry["params"]["method"] for entry in entries]


def test_the_floor_tells_whose_machine_was_slow():
    entries = [fake_entry(LORA, floor=0.100), fake_entry(FULL, floor=0.103)]
    assert quiet.disturbed(entries) == []
    entries += [fake_entry(DORA, floor=0.11), fake_entry(toy_case("shira"), floor=0.2)]
    assert names(quiet.disturbed(entries)) == ["shira", "dora"]
    assert names(quiet.disturbed(entries[2:])) == ["shira"]  # the others lie in the same file only
    # The ratio has no part in it.
    entries[-1] = fake_entry(toy_case("shira"), ratio=9.0, floor=0.1)
    assert names(quiet.disturbed(entries)) == ["dora"]


@pytest.mark.parametrize(
    "other",
    [
        {"length": 16},
        {"batch": 1},
        {"dtype": "bfloat16"},
        {"shape": LORA.shape.cut(1)},
        {"shape": LORA.shape.cut(2, vocab=100)},
        {"options": CHECKPOINTING},
    ],
    ids=lambda other: next(iter(other)),
)
def test_floors_of_other_sizes_say_nothing(other):
    slower = fake_entry(replace(FULL, **other), floor=0.5)
    assert quiet.disturbed([fake_entry(LORA), slower]) == []


@pytest.mark.parametrize("other", [{"options": FULL_DEPTH}, {"share": 0.1}, {"suite": "share"}])
def test_the_floor_does_not_depend_on_what_is_trained(other):
    slower = fake_entry(replace(FULL, **other), floor=0.5)
    assert names(quiet.disturbed([fake_entry(LORA), slower])) == ["full"]


def test_what_was_not_measured_and_copies_are_left_out():
    missing = measure.entry(FULL, None, {"status": "out of memory"})
    copy = fake_entry(DORA, floor=0.5, copy_of="another")
    assert quiet.disturbed([fake_entry(LORA), missing, copy]) == []


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """With three entries of which that of `full`, and its copy, had a slow floor."""
    monkeypatch.setattr(estimate.Estimate, "seconds", lambda self, case: 100.0)
    record = Record(tmp_path / "steps.json", torch.device("cpu"), {})
    setup = fresh.Setup(torch.device("cpu"), timing.Precision(), CEILINGS)
    record.add(fake_entry(LORA, floor=0.1))
    record.add(fake_entry(FULL, ratio=1.5, floor=0.2))
    record.add(fake_entry(replace(FULL, suite="tokens"), floor=0.2, copy_of=FULL.id))
    return Run(record, setup, None, {})


def measures(monkeypatch, *found: dict | Exception) -> list[str]:
    """What measuring returns in turn, the last for ever; the ids of what was measured."""
    results, done = list(found), []

    def measured(case, setup):
        done.append(case.id)
        result = results.pop(0) if len(results) > 1 else results[0]
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(measure, "measure", measured)
    return done


def ratios(run: Run) -> list[float]:
    """As the file has them."""
    entries = json.loads(run.record.path.read_text())["benchmarks"]
    return [entry["extra_info"]["ratio_to_floor"]["median"] for entry in entries]


def test_a_case_that_the_machine_was_slow_for_is_measured_again(run, monkeypatch):
    better = [
        fake_entry(FULL, ratio=ratio, floor=floor) for ratio, floor in ((1.7, 0.15), (1.8, 0.1))
    ]
    done = measures(monkeypatch, *better)
    run.repeat_disturbed([LORA, FULL])
    assert done == [FULL.id] * 2 and ratios(run) == [1.2, 1.8, 1.8]
    copy = run.record.entries[replace(FULL, suite="tokens").fullname]
    assert (copy["group"], copy["extra_info"]["copy_of"]) == ("tokens", FULL.id)


@pytest.mark.parametrize(
    "result", [fake_entry(FULL, ratio=1.0, floor=0.3), ZeroDivisionError("of this case")]
)
def test_what_is_no_better_is_not_kept(run, monkeypatch, result):
    done = measures(monkeypatch, result)
    run.repeat_disturbed([LORA, FULL])
    assert done == [FULL.id] * REPEATS and ratios(run) == [1.2, 1.5, 1.2]


def test_only_chosen_cases_are_repeated_and_only_in_time(run, monkeypatch):
    done = measures(monkeypatch, fake_entry(FULL))
    run.repeat_disturbed([LORA])
    run.deadline = 0.0
    run.repeat_disturbed([LORA, FULL])
    assert done == []
