"""What an entry says of its visits: which rounds count, and what comes of them."""

import json
import statistics
from dataclasses import replace
from math import inf

import pytest
from toy_cases import a_visit, fake_entry, toy_case

from bench import measure, quiet, visits
from bench.cases import CHECKPOINTING, FULL_DEPTH, PLAIN
from bench.visits import Visit

LORA, FULL, DORA = (toy_case(name) for name in ("lora", "full", "dora"))


def floors(*seconds: float) -> Visit:
    """Of a method that takes twice as long as its floor in the first round, then thrice, ..."""
    laps = [[each * times, 0.0, 0.0, 0.0] for times, each in enumerate(seconds, start=2)]
    return Visit(laps, list(seconds), periodic=0.0, paired=True, took=1.0)


def test_a_round_counts_by_the_floors_beside_it():
    visit = floors(1.0, 5.0, 1.0, 1.0, 3.0, 3.0, 3.0)
    assert visits.is_quiet(visit, inf) == [True] * 7
    # The slow second floor speaks against its neighbours, for itself the two beside it.
    assert visits.is_quiet(visit, 1.5) == [False, True, False, False, False, False, False]
    assert visits.is_quiet(visit, 2.0) == [False, True, False, True, True, False, False]
    assert visits.is_quiet(floors(1.0), 1.0) == [True] != visits.is_quiet(floors(1.1), 1.0)
    apart = replace(visit, paired=False)  # of no round
    assert visits.is_quiet(apart, 0.0) == [True] * 7


def test_an_entry_says_what_its_quiet_rounds_do():
    entry = measure.entry(LORA, floors(*[1.0] * 6), {"status": "measured"})
    entry = visits.with_visit(entry, floors(*[1.0] * 3, *[2.0] * 4))
    told = visits.summed_up(entry, 1.2)
    extra = told["extra_info"]
    assert extra["quiet_rounds"] == 8 and told["stats"]["rounds"] == 8
    assert extra["ratio_to_floor"]["data"] == [2, 3, 4, 5, 6, 7, 2, 3]
    assert extra["floor_seconds"]["median"] == 1.0
    assert told["stats"]["median"] == pytest.approx(3.5)
    assert extra["seconds"] == {"forward": 0, "backward": 0, "optimizer": 3.5, "periodic": 0}
    assert extra["tokens_per_second"] == pytest.approx(LORA.tokens / 3.5)
    assert visits.summed_up(entry, inf)["stats"]["rounds"] == 13


def test_with_few_quiet_rounds_all_count():
    entry = measure.entry(LORA, floors(1.0, 1.0, *[2.0] * 4), {"status": "measured"})
    told = visits.summed_up(entry, 1.2)
    assert told["extra_info"]["quiet_rounds"] == 1 and told["stats"]["rounds"] == 6


def test_a_visit_survives_the_file():
    visit = Visit([[1e-6, 0.25, 0.123456789, 1e-3]] * 2, [0.1, 1 / 3], 0.01, True, 2.5)
    entry = visits.with_visit(measure.entry(LORA, a_visit(), {}), visit)
    first, read = visits.of(json.loads(json.dumps(entry)))
    assert first.seconds == pytest.approx(a_visit().seconds, abs=1e-9)
    assert read.laps[0] == pytest.approx(visit.laps[0], abs=1e-9) and read.periodic == 0.01
    assert read.ratios == pytest.approx(visit.ratios, rel=1e-6)
    assert read.seconds == pytest.approx([0.384457789] * 2)


def test_ratios_apart_are_to_the_median_of_the_floor():
    visit = Visit([[0, 1.0, 1.0, 0], [0, 1.0, 3.0, 0]], [1.0, 2.0, 6.0], 0.5, False, 1.0)
    assert visit.ratios == [2.5 / 2, 4.5 / 2]
    entry = measure.entry(LORA, visit, {})
    assert entry["extra_info"]["floor_seconds"]["data"] == [1.0, 2.0, 6.0]
    assert entry["extra_info"]["paired"] is False


def limit_of(*entries: dict) -> float | None:
    return quiet.limits(entries).get(quiet.floor_of(entries[0]))


def test_the_floors_of_a_size_set_its_limit():
    entries = [fake_entry(LORA, floor=0.100), fake_entry(FULL, floor=0.104)]
    assert limit_of(entries[0]) is None  # one visit tells of no other
    expected = 1.06 * (0.75 * 0.100 + 0.25 * 0.104)  # from their lower quartile
    assert limit_of(*entries) == pytest.approx(expected)
    # Every visit is one, and the ratio has no part in it.
    entries[1] = visits.with_visit(entries[1], a_visit(ratio=9.0, floor=0.2))
    expected = 1.06 * 0.102
    assert limit_of(*entries) == pytest.approx(expected)


def test_one_lucky_floor_makes_no_others_slow():
    found = [fake_entry(replace(LORA, share=n / 100), floor=0.1) for n in range(1, 8)]
    assert limit_of(*found, fake_entry(FULL, floor=0.05)) == pytest.approx(0.106)


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
    assert limit_of(fake_entry(LORA), fake_entry(replace(FULL, **other), floor=0.5)) is None


@pytest.mark.parametrize("other", [{"options": FULL_DEPTH}, {"share": 0.1}, {"suite": "share"}])
def test_the_floor_does_not_depend_on_what_is_trained(other):
    entries = fake_entry(LORA, floor=0.1), fake_entry(replace(FULL, **other), floor=0.5)
    assert limit_of(*entries) == pytest.approx(1.06 * 0.2)


def test_what_was_not_measured_and_copies_are_left_out():
    missing = measure.entry(FULL, None, {"status": "out of memory"})
    copy = fake_entry(DORA, floor=0.5, copy_of="another")
    apart = measure.entry(FULL, a_visit(paired=False), {})
    compiled = fake_entry(replace(DORA, options=replace(PLAIN, compile=True)), floor=0.5)
    others = (missing, copy, apart, compiled)
    assert not any(map(quiet.may_be_visited, others)) and quiet.may_be_visited(fake_entry(LORA))
    assert limit_of(fake_entry(LORA), *others) is None


def test_a_slow_spell_does_not_move_what_is_told():
    """Half of the rounds are slow, and the method's less so than its floor's: as a step that waits
    for memory, where the floor's computes."""
    fast, slow = [[0, 0, 0, 2.0]] * 12, [[0, 0, 0, 2.4]] * 12
    visit = Visit(fast + slow, [1.0] * 12 + [1.4] * 12, 0.0, True, 1.0)
    entry = measure.entry(LORA, visit, {})
    assert statistics.median(visit.ratios) < 1.9
    assert visits.summed_up(entry, 1.06)["extra_info"]["ratio_to_floor"]["median"] == 2.0
