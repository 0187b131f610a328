"""Cases that the machine was slow for: which they are, and that they are measured again."""

import json
from dataclasses import replace

import pytest
import torch
from toy_cases import CEILINGS, fake_entry, toy_case

from bench import estimate, fresh, measure, quiet, rounds, timing
from bench.cases import CHECKPOINTING, FULL_DEPTH, PLAIN
from bench.record import Record
from bench.run import REPEATS, Run

LORA, FULL, DORA, SHIRA = (toy_case(name) for name in ("lora", "full", "dora", "shira"))
EIGHT = timing.Precision(min_rounds=8, max_rounds=8)
SETUP = fresh.Setup(torch.device("cpu"), EIGHT, CEILINGS)


def slow(*entries: dict) -> list[str]:
    return [entry["params"]["method"] for entry, _ in quiet.disturbed(entries)]


def test_the_floor_tells_when_the_machine_was_slow():
    entries = [fake_entry(LORA, floor=0.100), fake_entry(FULL, floor=0.104)]
    assert slow(*entries) == [] == slow(entries[0])
    entries += [fake_entry(DORA, floor=0.12), fake_entry(SHIRA, floor=0.2)]
    assert slow(*entries) == ["shira", "dora"]
    limit = 1.06 * (0.25 * 0.100 + 0.75 * 0.104)  # from their lower quartile
    assert [limit for _, limit in quiet.disturbed(entries)] == [pytest.approx(limit)] * 2
    assert slow(*entries[2:]) == ["shira"]  # nothing tells of a faster one
    # The ratio has no part in it.
    entries[-1] = fake_entry(SHIRA, ratio=9.0, floor=0.1)
    assert slow(*entries) == ["dora"]


def test_one_lucky_floor_makes_no_others_slow():
    found = [fake_entry(replace(LORA, share=n / 100), floor=0.1) for n in range(1, 8)]
    assert slow(*found, fake_entry(FULL, floor=0.05)) == []


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
    assert slow(fake_entry(LORA), fake_entry(replace(FULL, **other), floor=0.5)) == []


@pytest.mark.parametrize("other", [{"options": FULL_DEPTH}, {"share": 0.1}, {"suite": "share"}])
def test_the_floor_does_not_depend_on_what_is_trained(other):
    assert slow(fake_entry(LORA), fake_entry(replace(FULL, **other), floor=0.5)) == ["full"]


def test_what_was_not_measured_and_copies_are_left_out():
    missing = measure.entry(FULL, None, {"status": "out of memory"})
    copy = fake_entry(DORA, floor=0.5, copy_of="another")
    apart = fake_entry(SHIRA, floor=0.5)
    apart["extra_info"]["paired"] = False
    compiled = fake_entry(replace(SHIRA, options=replace(PLAIN, compile=True)), floor=0.5)
    assert slow(fake_entry(LORA), missing, copy, apart, compiled) == []


@pytest.mark.parametrize("limit, enough", [(1e-9, False), (1e9, True)])
def test_a_slow_floor_is_found_out_soon(monkeypatch, limit, enough):
    timed, real = [], rounds.step_laps

    def step_laps(method, batch, device):
        timed.append(method.name)
        return real(method, batch, device)

    monkeypatch.setattr(rounds, "step_laps", step_laps)
    monkeypatch.setattr(rounds, "PROBED_SECONDS", 0.0)
    before = fake_entry(LORA, ratio=9.0, floor=0.5)
    if enough:
        entry = measure.time_again(before, LORA, SETUP, limit)
        assert entry["extra_info"]["ratio_to_floor"]["median"] < 9.0
        assert quiet.seconds(entry) < 0.5 and entry["stats"]["rounds"] == 8
        assert entry["extra_info"]["bytes"] == before["extra_info"]["bytes"]
    else:
        with pytest.raises(rounds.Disturbed):
            measure.time_again(before, LORA, SETUP, limit)
    counted = 8 if enough else 5
    assert timed.count("frozen") == timed.count("lora") == rounds.WARM_UP + counted


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """With three entries of which that of `full`, and its copy, had a slow floor."""
    monkeypatch.setattr("bench.run.PAUSE", 0.0)
    monkeypatch.setattr(estimate.Estimate, "seconds", lambda self, case: 100.0)
    record = Record(tmp_path / "steps.json", torch.device("cpu"), {})
    record.add(fake_entry(LORA, floor=0.1))
    record.add(fake_entry(FULL, ratio=1.5, floor=0.2))
    record.add(fake_entry(replace(FULL, suite="tokens"), floor=0.2, copy_of=FULL.id))
    return Run(record, SETUP, None, {})


def measures(monkeypatch, *found: dict | Exception) -> list[str]:
    """What timing again returns in turn, the last for ever; the ids of what was timed."""
    results, done = list(found), []

    def time_again(before, case, setup, limit):
        assert before["name"] == case.id and limit < 0.2
        done.append(case.id)
        result = results.pop(0) if len(results) > 1 else results[0]
        if isinstance(result, Exception):
            raise result
        counted = {"repeats": before["extra_info"]["repeats"]}
        return result | {"extra_info": result["extra_info"] | counted}

    monkeypatch.setattr(measure, "time_again", time_again)
    return done


def ratios(run: Run) -> list[float]:
    """As the file has them."""
    entries = json.loads(run.record.path.read_text())["benchmarks"]
    return [entry["extra_info"]["ratio_to_floor"]["median"] for entry in entries]


def test_a_case_that_the_machine_was_slow_for_is_measured_again(run, monkeypatch, capsys):
    better = [
        fake_entry(FULL, ratio=ratio, floor=floor) for ratio, floor in ((1.7, 0.15), (1.8, 0.1))
    ]
    done = measures(monkeypatch, *better)
    run.repeat_disturbed([FULL])  # though the file alone knows of a faster floor
    assert done == [FULL.id] * 2 and ratios(run) == [1.2, 1.8, 1.8]
    assert run.record.entries[FULL.fullname]["extra_info"]["repeats"] == 2
    assert "beside a slow floor; without" not in capsys.readouterr().out
    copy = run.record.entries[replace(FULL, suite="tokens").fullname]
    assert (copy["group"], copy["extra_info"]["copy_of"]) == ("tokens", FULL.id)


@pytest.mark.parametrize(
    "result",
    [fake_entry(FULL, floor=0.3), rounds.Disturbed("slow"), ZeroDivisionError("of this case")],
)
def test_what_is_no_better_is_not_kept(run, monkeypatch, capsys, result):
    done = measures(monkeypatch, result)
    run.repeat_disturbed([LORA, FULL])
    assert done == [FULL.id] * REPEATS and ratios(run) == [1.2, 1.5, 1.2]
    assert "1 cases were timed beside a slow floor; without" in capsys.readouterr().out


def test_what_no_longer_fits_beside_its_floor_is_not_kept(run, monkeypatch):
    apart = fake_entry(FULL, ratio=1.0, floor=0.1)
    apart["extra_info"]["paired"] = False
    measures(monkeypatch, apart)
    run.repeat_disturbed([LORA, FULL])
    assert ratios(run) == [1.2, 1.5, 1.2]


def test_cases_take_turns(run, monkeypatch):
    """So that a slow minute does not take all the tries of one."""
    run.record.add(fake_entry(DORA, floor=0.3))
    run.record.add(fake_entry(SHIRA, floor=0.1))
    done = measures(monkeypatch, rounds.Disturbed("slow"))
    run.repeat_disturbed([LORA, FULL, DORA, SHIRA])
    assert done == [DORA.id, FULL.id] * REPEATS


def test_only_chosen_cases_are_repeated_and_only_in_time(run, monkeypatch):
    done = measures(monkeypatch, fake_entry(FULL))
    run.repeat_disturbed([LORA])
    run.deadline = 0.0
    run.repeat_disturbed([LORA, FULL])
    assert done == []
