"""Cases are visited until enough is known of them, in turn and within the budget."""

import json
from dataclasses import replace

import pytest
import torch
from toy_cases import CEILINGS, a_visit, fake_entry, measure_at_once, toy_case

from bench import counts, estimate, fresh, laboratory, measure, report, rounds, timing
from bench.cases import PLAIN
from bench.methods import METHODS, Unavailable
from bench.record import Record
from bench.run import VISITS, Goal, Run

LORA, FULL, DORA, SHIRA = (toy_case(name) for name in ("lora", "full", "dora", "shira"))
EIGHT = timing.Precision(min_rounds=8, max_rounds=8)
CPU = torch.device("cpu")
SETUP = fresh.Setup(CPU, EIGHT, CEILINGS)
TWICE = Goal(visits=2, quiet_rounds=5, error=1.0)
COPY = replace(FULL, suite="tokens")


@pytest.mark.parametrize("limit, enough", [(1e-9, False), (1e9, True)])
def test_a_slow_floor_is_found_out_soon(monkeypatch, limit, enough):
    timed, real = [], rounds.step_laps

    def step_laps(method, batch, device):
        timed.append(method.name)
        return real(method, batch, device)

    monkeypatch.setattr(rounds, "step_laps", step_laps)
    monkeypatch.setattr(rounds, "PROBED_SECONDS", 0.0)
    if enough:
        visit = measure.visit_again(LORA, SETUP, limit)
        assert len(visit.laps) == len(visit.floor) == 8
        assert visit.took > sum(visit.seconds) > 0
    else:
        with pytest.raises(rounds.Disturbed):
            measure.visit_again(LORA, SETUP, limit)
    counted = 8 if enough else rounds.PROBED
    assert timed.count("frozen") == timed.count("lora") == rounds.WARM_UP + counted


def test_two_models_that_cramp_the_allocator_are_timed_apart(monkeypatch):
    numbers = iter([3, 4])  # of the pair; one alone is not looked at twice
    monkeypatch.setattr(rounds, "retries", lambda device: next(numbers, 9))
    assert measure.visit_again(LORA, SETUP, float("inf")).paired is False


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """With two entries, and a copy of the second."""
    monkeypatch.setattr("bench.run.PAUSE", 0.0)
    monkeypatch.setattr(estimate.Estimate, "seconds", lambda self, case: 100.0)
    record = Record(tmp_path / "steps.json", CPU, {})
    record.add(fake_entry(LORA), fake_entry(FULL, ratio=1.5))
    record.add(fake_entry(COPY, ratio=1.5, copy_of=FULL.id))
    run = Run(record, SETUP, None, {})
    run.sum_up()
    return run


def visited(monkeypatch, *found) -> list[str]:
    """What a visit returns or raises in turn, the last for ever; the ids of what was visited."""
    results, done = list(found), []

    def visit_again(case, setup, limit):
        done.append(case.id)
        result = results.pop(0) if len(results) > 1 else results[0]
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(measure, "visit_again", visit_again)
    return done


def told(run: Run) -> dict[str, dict]:
    """extra_info by the id of the case, as the file has it."""
    entries = json.loads(run.record.path.read_text())["benchmarks"]
    return {entry["name"]: entry["extra_info"] for entry in entries}


def test_every_case_is_visited_until_enough_is_known(run, monkeypatch, capsys):
    done = visited(monkeypatch, a_visit(1.2), a_visit(1.9))
    run.visit([LORA, FULL, COPY], TWICE)
    assert done == [LORA.id, FULL.id]
    extra = told(run)
    assert [extra[case.id]["quiet_rounds"] for case in (LORA, FULL)] == [6, 6]
    assert extra[LORA.id]["ratio_to_floor"]["median"] == pytest.approx(1.2)
    assert extra[FULL.id]["ratio_to_floor"]["median"] == pytest.approx(1.7, abs=0.01)
    copy = {name: value for name, value in extra[FULL.id].items() if name != "visits"}
    assert extra[COPY.id] == copy | {"copy_of": FULL.id}
    assert "not known well enough" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "goal, visits",
    [
        (Goal(visits=3, quiet_rounds=0, error=1.0), 3),
        (Goal(visits=1, quiet_rounds=10, error=1.0), 4),
        (Goal(visits=1, quiet_rounds=0, error=0.005), 5),  # (1.253 / 1.349) 0.02 / sqrt(15)
    ],
)
def test_goals(run, monkeypatch, goal, visits):
    visited(monkeypatch, a_visit(1.2))
    run.visit([LORA], goal)
    assert len(told(run)[LORA.id]["visits"]) == visits


def test_what_a_visit_says_of_the_machine_is_said_of_all_earlier_ones(run, monkeypatch):
    """The first visits were slow, as the next ones show; the ratio in them was another."""
    visited(monkeypatch, *[a_visit(ratio, floor=0.05) for ratio in (2.0, 2.0, 3.0, 3.0)])
    run.visit([LORA, FULL], Goal(visits=3, quiet_rounds=5, error=1.0))
    extra = told(run)
    assert [extra[case.id]["quiet_rounds"] for case in (LORA, FULL)] == [6, 6]
    assert extra[LORA.id]["ratio_to_floor"]["data"] == pytest.approx(
        [2 * 0.99, 2, 2 * 1.01, 3 * 0.99, 3, 3 * 1.01], rel=1e-4
    )
    assert extra[FULL.id]["floor_seconds"]["median"] == 0.05


@pytest.mark.parametrize(
    "result",
    [a_visit(paired=False), rounds.Disturbed("slow"), ZeroDivisionError("of this case")],
)
def test_what_a_visit_that_came_to_nothing_leaves(run, monkeypatch, capsys, result):
    done = visited(monkeypatch, result)
    before = told(run)
    run.visit([LORA], TWICE)
    assert done == [LORA.id] * VISITS
    assert "1 cases are not known well enough" in capsys.readouterr().out
    assert told(run) == before | {LORA.id: before[LORA.id] | {"given_up": VISITS}}


def test_cases_take_turns(run, monkeypatch):
    """So that a slow minute does not take all the tries of one; in earlier runs, too."""
    run.record.add(fake_entry(DORA, given_up=1), fake_entry(SHIRA))
    done = visited(monkeypatch, rounds.Disturbed("slow"))
    run.visit([LORA, FULL, DORA, SHIRA], TWICE)
    assert done[:6] == [LORA.id, FULL.id, SHIRA.id, LORA.id, FULL.id, DORA.id]
    assert len(done) == 4 * VISITS


def test_a_process_that_a_visit_ends_leaves_the_others_their_turn(run, monkeypatch):
    done = visited(monkeypatch, KeyboardInterrupt())
    monkeypatch.setattr(measure, "visit_again", _interrupted(done))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run.visit([LORA, FULL], TWICE)
    assert done == [LORA.id, FULL.id]


def _interrupted(done: list[str]):
    def visit_again(case, setup, limit):
        done.append(case.id)
        raise KeyboardInterrupt

    return visit_again


def test_only_chosen_cases_of_this_code_are_visited_and_only_in_time(run, monkeypatch):
    done = visited(monkeypatch, a_visit())
    run.record.add(fake_entry(DORA, source="another"))
    run.visit([DORA, SHIRA], TWICE)
    run.deadline = 0.0
    run.record.add(fake_entry(SHIRA, floor=0.2))
    run.visit([LORA, FULL, SHIRA], TWICE)
    assert done == []
    assert told(run)[SHIRA.id]["quiet_rounds"] == 0  # of its first visit, as the others tell


def test_what_is_to_be_measured_comes_in_this_order(tmp_path, monkeypatch):
    others = [toy_case(name) for name in ("loreft", "lisa", "lora_fused", "s2ft_additive")]
    record = Record(tmp_path / "steps.json", CPU, {})
    record.add(
        measure.entry(LORA, None, {"status": "failed: ZeroDivisionError"}),
        fake_entry(FULL, source="another"),
        measure.entry(DORA, None, {"status": "unavailable: a package is not installed"}),
        measure.entry(SHIRA, None, {"status": "unavailable: a package is not installed"}),
        measure.entry(others[0], None, {"status": "out of memory", "source": report.source_hash()}),
        fake_entry(others[1]),
    )

    def check(device, options):
        raise Unavailable("a package is not installed")

    monkeypatch.setattr(METHODS["shira"], "check", check)
    chosen = [LORA, FULL, DORA, SHIRA, *others, replace(LORA, suite="tokens")]
    todo = laboratory.missing(chosen, record, CPU)
    assert todo == [DORA, *others[2:], FULL, LORA, replace(LORA, suite="tokens")]


@pytest.mark.parametrize(
    "before",
    [
        fake_entry(LORA, source="another"),
        measure.entry(LORA, None, {"status": "unavailable: a package is not installed"}),
    ],
    ids=["of other code", "unavailable then"],
)
def test_what_may_be_measured_now_is_no_copy_of_what_was_known(tmp_path, monkeypatch, before):
    done = measure_at_once(monkeypatch)
    record = Record(tmp_path / "steps.json", CPU, {})
    record.add(before)
    run = Run(record, SETUP, None, record.entries)
    run.measure([LORA, replace(LORA, suite="tokens")])
    assert done == [LORA.id]
    first, copy = record.entries.values()
    assert first["extra_info"]["source"] == report.source_hash() and first["stats"] is not None
    assert "copy_of" not in first["extra_info"] and copy["extra_info"]["copy_of"] == LORA.id


def test_launches_are_counted_last_where_they_are_not_known(run, monkeypatch):
    run.setup = replace(SETUP, device=torch.device("cuda"))
    compiled = replace(DORA, options=replace(PLAIN, compile=True))
    run.record.add(fake_entry(compiled), fake_entry(SHIRA, launches=5))
    run.record.add(measure.entry(toy_case("lisa"), None, {"status": "out of memory"}))
    counted = []

    def launches(case, setup):
        counted.append(case.id)
        return 7

    monkeypatch.setattr(measure, "launches", launches)
    run.count_launches([LORA, FULL, COPY, compiled, SHIRA, toy_case("lisa"), toy_case("loreft")])
    assert counted == [LORA.id, FULL.id]
    assert [told(run)[case.id]["launches"] for case in (LORA, FULL, COPY, SHIRA)] == [7, 7, 7, 5]


def test_launches_are_those_of_one_step_after_the_first(monkeypatch):
    seen = []

    def launches(action, device):
        action()
        seen.append(device)
        return 3

    monkeypatch.setattr(counts, "launches", launches)
    assert measure.launches(LORA, SETUP) == 3 and seen == [CPU]


def test_the_source_is_of_what_a_step_runs(tmp_path, monkeypatch):
    counted = ("s2kernels/kernels/a.py", "bench/methods/b.py")
    others = ("s2kernels/cli/c.py", "bench/d.py")
    for name in (*counted, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    read = report.source_hash.__wrapped__
    before = read()
    for name in others:
        (tmp_path / name).write_text("x = 2\n")
    assert read() == before
    for name in counted:
        (tmp_path / name).write_text("x = 2\n")
        assert read() != before
        before = read()
