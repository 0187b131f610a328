"""Which steps are measured."""

from dataclasses import replace

import pytest

from bench.methods import METHODS
from bench.steps import cases
from bench.steps.cases import PLAIN, Case
from bench.steps.model_shapes import TABLE

SUITES = {"cpu": cases.cpu(), "gpu": cases.gpu(), "toy": cases.toy()}


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_cases_are_unique_and_have_their_floor(suite):
    ids = [case.id for case in suite]
    assert len(ids) == len(set(ids))
    for case in suite:
        floor = case.floor()
        assert floor.method == "frozen" and floor.share is None
        assert floor.options == replace(case.options, full_depth=False)
        assert floor.id in ids, f"without the floor of {case.id} a figure has no seconds of it"


def test_every_method_is_in_the_first_figure():
    for name in ("cpu", "toy"):
        first = {case.method for case in SUITES[name] if "figure5" in case.suites}
        assert first == METHODS.keys()
    for suite in SUITES.values():
        assert {case.method for case in suite} == METHODS.keys()


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_equal_depth_is_measured_where_the_first_table_is(name):
    """`plots.tables` puts both into one row."""
    suite = SUITES[name]
    first = suite[0].shape
    *_, table = (case for case in suite if "figure5" in case.suites and case.shape == first)
    ids = {case.id for case in suite}
    for method in cases.STOPPING:
        assert replace(table, method=method, options=cases.FULL_DEPTH).id in ids
    assert {name for name in METHODS if name.startswith("s2ft")} <= set(cases.STOPPING)


def test_a_case_of_two_suites_is_there_once():
    (case,) = (case for case in SUITES["toy"] if case.id == "toy/2x16/float32/s2ft_inplace")
    assert case.suites == ("figure5", "depth", "tokens", "extrapolation", "checkpointing")


def test_ids_say_what_a_case_is():
    options = replace(PLAIN, checkpointing=True, attention="cudnn")
    shape = TABLE["llama-2-7b"].cut(2)
    case = Case(("share",), shape, 4, 512, "bfloat16", "lora", options, share=0.001)
    assert case.id == "llama-2-7b:2of32/4x512/bfloat16/lora+checkpointing+cudnn/0.10%"
    params = case.params()
    assert params["tokens"] == 2048 and params["of_layers"] == 32
    assert params["floor"] == "llama-2-7b:2of32/4x512/bfloat16/frozen+checkpointing+cudnn"
    case = replace(case, shape=shape.cut(2, vocab=1000), options=PLAIN, share=None)
    assert case.id == "llama-2-7b:2of32,1000of32000/4x512/bfloat16/lora"
    assert case.params()["vocab"] == 1000 and case.params()["of_vocab"] == 32000


@pytest.mark.parametrize("device_type, name", [("cpu", "cpu"), ("cuda", "gpu")])
def test_the_short_suite_is_the_core_of_the_devices_own(device_type, name):
    short = cases.suite("short", device_type)
    assert set(short) <= set(SUITES[name])
    assert sorted(case.method for case in short) == sorted(cases.CORE)
