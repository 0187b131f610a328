"""What of two runs counts as a loss, and the commands that compare them."""

import json
import subprocess

import pytest
import torch
from toy_cases import CEILINGS, fake_entry, measure_at_once, toy_case

from bench import cases, ceilings, compare, report, timing
from bench.record import Record

CPU = torch.device("cpu")


def document(*entries: dict, **machine) -> dict:
    return {"machine_info": report.machine_info(CPU) | machine, "benchmarks": list(entries)}


@pytest.mark.parametrize(
    "after, code, words",
    [
        ({}, 0, "no loss"),
        ({"ratio": 1.22}, 0, "no loss"),
        ({"ratio": 1.3}, 1, "LOSS  figure5/toy/2x8/float32/lora: step / floor 1.200 -> 1.300"),
        ({"ratio": 1.1}, 0, "gain  figure5/toy/2x8/float32/lora: step / floor 1.200 -> 1.100"),
        ({"saved": 1001}, 1, "saved 1,000 bytes -> 1,001 bytes"),
        ({"saved": 900}, 0, "gain"),
        ({"unseen": 8}, 1, "unseen 0 bytes -> 8 bytes"),
        ({"peak": 10_050}, 0, "no loss"),
        ({"peak": 10_200}, 1, "peak 10,000 bytes -> 10,200 bytes"),
        ({"first_step_peak": 9_050}, 0, "no loss"),
        ({"first_step_peak": 9_100}, 1, "first_step_peak 9,000 bytes -> 9,100 bytes"),
        ({"ops": 10}, 1, "ops 9 -> 10"),
        ({"launches": 101}, 0, "no loss"),
        ({"launches": 102}, 1, "launches 100 -> 102"),
        ({"trained_parameters": 6}, 1, "trained parameters 7 -> 6"),
        ({"status": "out of memory"}, 1, "status measured -> out of memory"),
    ],
)
def test_compare(after, code, words, capsys):
    before = fake_entry(toy_case("lora"), launches=100)
    changed = fake_entry(toy_case("lora"), after.pop("ratio", 1.2), launches=100)
    extra = changed["extra_info"]
    for name, value in after.items():
        (extra["bytes"] if name in extra["bytes"] else extra)[name] = value
    if extra["status"] != "measured":
        changed["stats"] = None
        del extra["ratio_to_floor"]
    assert compare.compare(document(before), document(changed)) == code
    assert words in capsys.readouterr().out


def test_compare_takes_the_spread_of_noisy_runs_into_account():
    quiet = {"data": [1.19, 1.2, 1.21]}
    noisy = {"data": [0.9, 1.2, 1.5]}
    assert compare.spread(quiet, quiet) < 0.05 < compare.spread(quiet, noisy)


def test_operators_of_other_versions_are_not_compared():
    before, after = fake_entry(toy_case("lora")), fake_entry(toy_case("lora"), ops=10)
    assert compare.compare(document(before), document(after, torch="0.1")) == 0


def test_noise_is_no_excuse(capsys):
    before, after = fake_entry(toy_case("lora")), fake_entry(toy_case("lora"))
    after["extra_info"]["ratio_to_floor"] = timing.quartiles([0.9, 1.25, 1.6])
    assert compare.compare(document(before), document(after)) == compare.NOISE == 3
    assert "figure5/toy/2x8/float32/lora: too noisy to judge" in capsys.readouterr().out
    after["extra_info"]["bytes"] |= {"saved": 1001}
    assert compare.compare(document(before), document(after)) == compare.LOSS == 1


def test_a_case_that_is_not_measured_is_a_loss(capsys):
    before = [fake_entry(toy_case(name)) for name in ("lora", "full", "lisa")]
    wanted = {entry["name"] for entry in before[:2]} | {"new"}
    assert compare.compare(document(*before), document(*before[:2]), wanted) == 0
    assert compare.compare(document(*before), document(before[0]), wanted) == 1
    assert "LOSS  figure5/toy/2x8/float32/full: status measured -> not measured" in (
        capsys.readouterr().out
    )


def test_compare_refuses_what_cannot_be_compared(tmp_path):
    entry, other = fake_entry(toy_case("lora")), fake_entry(toy_case("full"))
    with pytest.raises(ValueError, match="reference 'cpu', candidate 'NVIDIA H200'"):
        compare.compare(document(entry), document(entry, gpu="NVIDIA H200"))
    with pytest.raises(ValueError, match="no case is in both"):
        compare.compare(document(entry), document(other))
    with pytest.raises(ValueError, match="no such file"):
        compare.main(["--reference", str(tmp_path / "steps.json")])


def test_compare_measures_the_short_suite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ceilings, "measure", lambda device: CEILINGS)
    quick = measure_at_once(monkeypatch)
    for case in cases.short("cpu"):
        Record(tmp_path / "steps.json", CPU, {}).add(fake_entry(case))
    assert compare.main(["--device", "cpu", "--reference", str(tmp_path / "steps.json")]) == 0
    assert quick == [case.id for case in cases.short("cpu")]
    said = capsys.readouterr().out
    for case in cases.short("cpu"):  # by the rule of the results that it is compared with
        assert f"{case.id}: 1.200 x floor, 1.200 x floor" in said
    assert "largest change of a ratio 0.0%" in said


def agreement_of(tmp_path, first: dict, second: dict) -> int:
    names = []
    for name, each in (("first", first), ("second", second)):
        names.append(tmp_path / f"{name}.json")
        names[-1].write_text(json.dumps(each))
    arguments = ["--device", "cpu", "--reference", str(names[0]), "--results", str(names[1])]
    return compare.main(arguments)


def test_runs_agree_within_five_percent_whatever_their_spread(tmp_path, capsys):
    slow = fake_entry(toy_case("dora"), 2.0)
    first = [fake_entry(toy_case("lora"), 1.2), slow]
    assert agreement_of(tmp_path, document(*first), document(*first)) == 0
    assert "2 of 2 ratios agree within 5%" in capsys.readouterr().out
    second = [fake_entry(toy_case("lora"), 1.25), fake_entry(toy_case("dora"), 1.8)]
    copy = {**slow, "name": "copy", "extra_info": slow["extra_info"] | {"copy_of": slow["name"]}}
    assert agreement_of(tmp_path, document(*first), document(*second, copy)) == 1
    said = capsys.readouterr().out
    assert "figure5/toy/2x8/float32/lora  1.200   1.250   +4.2%" in said
    assert "1 of 2 ratios agree" in said and "copy" not in said
    assert "APART  figure5/toy/2x8/float32/dora: 2.000 -> 1.800 (-10.0%)" in said


def test_a_ratio_that_one_run_lacks_is_no_agreement(tmp_path, capsys):
    entries = [fake_entry(toy_case(name), 1.2) for name in ("lora", "full")]
    for pair in ((entries, entries[:1]), (entries[:1], entries)):
        assert agreement_of(tmp_path, *(document(*each) for each in pair)) == 1
        assert "APART  figure5/toy/2x8/float32/full: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="two classes of devices"):
        agreement_of(tmp_path, document(*entries), document(*entries, gpu="NVIDIA H200"))


def test_without_git_nobody_knows_of_changes(monkeypatch):
    monkeypatch.setattr(report, "_output", lambda *command: None)
    assert report.commit_info()["dirty"] is None


def test_make_knows_the_benchmarks():
    done = subprocess.run(
        ["make", "-n", "-B", "bench", "bench-compare"],
        cwd=report.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for words in ("pytest bench/kernels/bench_ops.py", "-m bench.laboratory", "-m bench.compare"):
        assert words in done.stdout
