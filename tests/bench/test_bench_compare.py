"""Two files of results beside each other: what counts as a loss."""

import copy
import json

import pytest

from bench.steps import compare

CASE = "toy/2x8/float32/lora"


def entry(ratio: float = 1.2, spread: float = 0.01, **extra) -> dict:
    data = [ratio - spread, ratio, ratio + spread] * 5
    sizes = dict.fromkeys(("weights", "gradients", "optimizer", "temporaries", "unseen"), 0)
    known = {
        "status": "measured",
        "trained_parameters": 7,
        "bytes": sizes | {"saved": 1000, "peak": 10_000, "first_step_peak": 9_000},
        "ratio_to_floor": {"median": ratio, "iqr": 2 * spread, "data": data},
    }
    return {
        "fullname": f"bench/steps/bench_steps.py::bench_step[{CASE}]",
        "extra_info": known | extra,
    }


def document(*entries: dict, gpu: str | None = None) -> dict:
    return {"machine_info": {"gpu": gpu}, "benchmarks": list(entries)}


def larger_by(part: str, number: int) -> dict:
    found = entry()
    found["extra_info"]["bytes"][part] += number
    return found


@pytest.mark.parametrize(
    "after, code, words",
    [
        (entry(), 0, "no loss in 1 cases"),
        (entry(1.22), 0, "no loss"),  # within what two runs differ by
        (entry(1.0), 0, "no loss"),
        (entry(1.4), compare.LOSS, f"LOSS  {CASE}: step / floor 1.200 -> 1.400"),
        (entry(1.25, spread=0.2), compare.NOISE, f"too noisy to judge: {CASE}"),
        (larger_by("saved", 8), compare.LOSS, "saved 1,000 -> 1,008 bytes"),
        (larger_by("saved", -8), 0, "no loss"),
        (larger_by("peak", 90), 0, "no loss"),
        (larger_by("peak", 110), compare.LOSS, "peak 10,000 -> 10,110 bytes"),
        (entry(trained_parameters=8), compare.LOSS, "trained parameters 7 -> 8"),
        (entry(status="out of memory"), compare.LOSS, "measured -> out of memory"),
    ],
)
def test_what_counts_as_a_loss(after, code, words, capsys):
    assert compare.compare(document(entry()), document(after)) == code
    assert words in capsys.readouterr().out


def test_what_was_not_measured_before_is_no_loss(capsys):
    before = entry(status="out of memory")
    del before["extra_info"]["ratio_to_floor"]
    assert compare.compare(document(before), document(entry())) == 0


def test_more_rounds_tell_smaller_differences():
    few, many = entry()["extra_info"], copy.deepcopy(entry()["extra_info"])
    many["ratio_to_floor"]["data"] *= 4
    errors = [compare.standard_error(extra["ratio_to_floor"]) for extra in (few, many)]
    assert errors[1] == pytest.approx(errors[0] / 2)
    assert compare.spread_of(many, many) < compare.spread_of(few, few)


def test_other_devices_and_other_cases_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="two devices cannot be compared: cpu and H200"):
        compare.compare(document(entry()), document(entry(), gpu="H200"))
    with pytest.raises(ValueError, match="no case is in both"):
        compare.compare(document(entry()), document(entry() | {"fullname": "another"}))
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document(entry())))
    assert compare.main([str(path), str(path)]) == 0
    with pytest.raises(SystemExit) as stop:
        compare.main([str(path), str(tmp_path / "absent.json")])
    assert stop.value.code == 2 and "no such file" in capsys.readouterr().err


def test_the_overview_has_every_step_and_says_what_is_missing():
    missing = entry(status="unavailable: galore-torch is not installed") | {"fullname": "b[gone]"}
    del missing["extra_info"]["ratio_to_floor"]
    full = entry()
    full["stats"] = {"median": 0.5}
    full["extra_info"]["ratio_to_floor"] |= {"q1": 1.19, "q3": 1.21}
    text = compare.overview({each["fullname"]: each for each in (full, missing)})
    row = next(line for line in text.splitlines() if line.startswith(CASE))
    assert row.split()[1:5] == ["7", "1.200", "1.190..1.210", "500.0"]
    assert "gone" in text and "unavailable" in text
    assert compare.overview({"op": {"extra_info": {"bytes": 1}}}) == ""
