"""Two files of results beside each other: what counts as a loss."""

import json

import pytest

from bench.steps import compare

CASE = "toy/2x8/float32/lora"


def entry(ratio: float = 1.2, spread: float = 0.01, **extra) -> dict:
    sizes = dict.fromkeys(("weights", "gradients", "optimizer", "temporaries", "unseen"), 0)
    known = {
        "status": "measured",
        "trained_parameters": 7,
        "bytes": sizes | {"saved": 1000, "peak": 10_000, "first_step_peak": 9_000},
        "ratio_to_floor": {"median": ratio, "q1": ratio - spread, "q3": ratio + spread},
    }
    name = f"bench/steps/bench_steps.py::bench_step[{CASE}]"
    return {"fullname": name, "stats": {"median": 0.5}, "extra_info": known | extra}


def document(*entries: dict, gpu: str | None = None) -> dict:
    return {"machine_info": {"gpu": gpu}, "benchmarks": list(entries)}


def larger_by(part: str, number: int) -> dict:
    found = entry()
    found["extra_info"]["bytes"][part] += number
    return found


@pytest.mark.parametrize(
    "after, loss",
    [
        (entry(), None),
        (entry(1.22), None),  # within what two runs differ by
        (entry(1.0), None),
        (entry(1.4), f"{CASE}: step / floor 1.200 -> 1.400"),
        (entry(1.4, spread=0.3), None),  # its quartiles reach down to those of before
        (larger_by("saved", 8), f"{CASE}: saved 1,000 -> 1,008 bytes"),
        (larger_by("saved", -8), None),
        (larger_by("peak", 90), None),
        (larger_by("peak", 110), f"{CASE}: peak 10,000 -> 10,110 bytes"),
        (entry(trained_parameters=8), f"{CASE}: trained parameters 7 -> 8"),
        (entry(status="out of memory"), f"{CASE}: measured -> out of memory"),
    ],
)
def test_what_counts_as_a_loss(after, loss, tmp_path, capsys):
    assert compare.compare(document(entry()), document(after)) == ([loss] if loss else [])
    files = [tmp_path / name for name in ("before.json", "after.json")]
    for file, found in zip(files, (entry(), after), strict=True):
        file.write_text(json.dumps(document(found)))
    assert compare.main([str(file) for file in files]) == bool(loss)
    assert (f"LOSS  {loss}" if loss else "no loss") in capsys.readouterr().out


def test_what_was_not_measured_before_is_no_loss():
    before = entry(status="out of memory")
    del before["extra_info"]["ratio_to_floor"]
    assert compare.compare(document(before), document(entry())) == []


def test_other_devices_and_other_cases_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="two devices cannot be compared: cpu and H200"):
        compare.compare(document(entry()), document(entry(), gpu="H200"))
    with pytest.raises(ValueError, match="no case is in both"):
        compare.compare(document(entry()), document(entry() | {"fullname": "another"}))
    with pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path / "absent.json"), str(tmp_path / "absent.json")])
    assert stop.value.code == 2 and "no such file" in capsys.readouterr().err


def test_the_overview_has_every_step_and_says_what_is_missing():
    missing = entry(status="unavailable: galore-torch is not installed") | {"fullname": "b[gone]"}
    del missing["extra_info"]["ratio_to_floor"]
    op = {"fullname": "op", "extra_info": {"bytes": 1}}
    text = compare.overview({each["fullname"]: each for each in (entry(), missing, op)})
    row = next(line for line in text.splitlines() if line.startswith(CASE))
    assert row.split()[1:5] == ["7", "1.200", "1.190..1.210", "500.0"]
    assert "gone" in text and "unavailable" in text and "op" not in text.split()
    assert compare.overview({"op": op}) == ""
