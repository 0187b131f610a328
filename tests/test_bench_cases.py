"""The lists of cases, the clock, and the lines through few layers."""

import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from toy_cases import fake_entry, toy_case

from bench import cases, ceilings, extrapolation, timing
from bench.cases import PLAIN, Case
from bench.methods import METHODS
from bench.steps.model_shapes import TABLE

CPU = torch.device("cpu")


@pytest.mark.parametrize("suite", [cases.cpu(), cases.gpu(), cases.toy()])
def test_cases_are_unique_and_have_their_floor(suite):
    ids = [case.id for case in suite]
    assert len(ids) == len(set(ids))
    assert {case.method for case in suite} <= METHODS.keys()
    for case in suite:
        assert (floor := case.floor()).method == "frozen" and floor.options == case.options


def test_every_method_is_in_the_first_figure():
    for suite in (cases.cpu(), cases.toy()):
        assert {case.method for case in suite if case.suite == "figure5"} == METHODS.keys()
    on_gpu = {case.method for case in cases.gpu()}
    assert on_gpu == METHODS.keys()


@pytest.mark.parametrize("suite", [cases.cpu(), cases.gpu()])
def test_equal_depth_is_measured_where_the_first_table_is(suite):
    """`plots.laboratory` puts both into one row, by size."""
    first = suite[0].shape
    *_, table = (case for case in suite if case.suite == "figure5" and case.shape == first)
    same = replace(table, suite="depth", options=cases.FULL_DEPTH)
    assert {replace(same, method=method) for method in cases.STOPPING} <= set(suite)
    of_s2ft = {name for name in METHODS if name.startswith("s2ft")}
    assert of_s2ft | {"lora", "lora_fused"} <= set(cases.STOPPING)


def test_ids_say_what_a_case_is():
    options = replace(PLAIN, checkpointing=True, attention="flash")
    shape = TABLE["llama-2-7b"].cut(2)
    case = Case("share", shape, 4, 512, "bfloat16", "lora", options, share=0.001)
    assert case.id == "share/llama-2-7b:2of32/4x512/bfloat16/lora+checkpointing+flash/0.10%"
    assert case.params()["tokens"] == 2048 and case.params()["of_layers"] == 32
    case = replace(case, shape=shape.cut(2, vocab=1000), options=PLAIN, share=None)
    assert case.id == "share/llama-2-7b:2of32,1000of32000/4x512/bfloat16/lora"
    assert case.params()["vocab"] == 1000 and case.params()["of_vocab"] == 32000


@pytest.mark.parametrize("device_type, suite", [("cpu", cases.cpu()), ("cuda", cases.gpu())])
def test_the_short_suite_is_a_part_of_the_devices_own(device_type, suite):
    short = cases.short(device_type)
    assert set(short) <= set(suite) and {case.method for case in short} == set(cases.CORE)


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="got \\['abacus'\\]"):
        cases.grid("figure5", TABLE["toy"], [(1, 8)], "float32", ["lora", "abacus"])


def test_order_gives_two_methods_both_places():
    orders = [timing.order(["a", "b"], round_) for round_ in range(4)]
    assert sorted(orders) == [["a", "b"]] * 2 + [["b", "a"]] * 2


def test_laps_are_the_seconds_of_each_part():
    first, second = timing.laps([lambda: time.sleep(0.02), lambda: time.sleep(0.05)], CPU)
    assert 0.02 <= first < second and second >= 0.05


def test_standard_error_falls_with_the_rounds():
    few = [0.98, 0.99, 1.0, 1.01, 1.02]
    assert timing.standard_error(few * 4) == pytest.approx(timing.standard_error(few) / 2)
    assert timing.standard_error([1.0] * 5) == 0.0


@pytest.mark.parametrize(
    "data, seconds, reached",
    [
        ([1.0] * 4, 99.0, False),  # too few, however long they took
        ([1.0] * 5, 0.0, True),  # known exactly
        ([0.5, 1.0, 1.5, 1.0, 2.0], 0.0, False),
        ([0.5, 1.0, 1.5, 1.0, 2.0], 10.0, True),  # long enough
        ([0.5, 1.0, 1.5, 1.0, 2.0] * 2, 0.0, True),  # often enough
    ],
)
def test_precision_reached(data, seconds, reached):
    precision = timing.Precision(error=0.01, min_rounds=5, max_rounds=10, seconds=10.0)
    assert precision.reached(data, seconds) is reached


def test_a_short_step_is_measured_for_some_time():
    precision = timing.Precision(min_rounds=5, max_rounds=60, min_seconds=3.0)
    assert not precision.reached([1.0] * 50, 2.9)
    assert precision.reached([1.0] * 5, 3.0) and precision.reached([1.0] * 60, 0.1)


def test_other_cases_lie_between_those_of_one_size_on_a_cpu():
    """So that the floors of a size are those of several moods of the machine: see bench.quiet."""
    ids = [case.id for case in cases.cpu()]
    cut = [number for number, id_ in enumerate(ids) if "small:1of8" in id_]
    assert len(cut) == 4 and all(later - one > 5 for one, later in pairwise(cut))


def test_ceilings_are_rates(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(ceilings, "GEMM", {"cpu": 64})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(ceilings, "seconds", lambda action, device: (action(), 0.5)[1])
    found = ceilings.measure(CPU)
    assert found["gemm_flops"] == {"float32": 2 * 64**3 / 0.5, "bfloat16": 2 * 64**3 / 0.5}
    assert found["copy_bytes_per_second"] == 2 * 2**16 / 0.5


def test_extrapolation_says_how_far_off_it_is():
    shape = TABLE["small"]
    entries = []
    for layers, floor in ((1, 0.1), (2, 0.15), (8, 0.5)):
        case = toy_case("lora", shape=shape.cut(layers))
        entries.append(fake_entry(case, ratio=2.0, floor=floor))
    (line,) = extrapolation.lines(entries)
    assert "extrapolated from 1 and 2 layers to 8: step ms 900.0 (measured 1000.0: -10.0%)" in line
    (line,) = extrapolation.lines(entries[:2])
    assert "step ms 900.0 (not measured)" in line
    assert list(extrapolation.lines(entries[1:])) == []


def test_extrapolation_is_of_ratios_to_one_floor_for_a_size():
    """LoRA's cut of two layers was timed while the machine took twice as long."""
    entries = [
        fake_entry(toy_case(method, shape=TABLE["small"].cut(layers)), ratio=ratio, floor=floor)
        for method, layers, ratio, floor in (
            *(("full", 1, 1.5, 0.1), ("full", 2, 1.5, 0.2), ("dora", 2, 1.5, 0.2)),
            *(("lora", 1, 1.2, 0.1), ("lora", 2, 1.2, 0.4)),
        )
    ]
    copy = fake_entry(
        toy_case("lora", shape=TABLE["small"].cut(8)), ratio=1.5, floor=0.8, copy_of="another"
    )
    *_, line = extrapolation.lines([*entries, copy])
    assert "to 8: step ms 960.0 (measured 1200.0: -20.0%)" in line
