"""Times that are drawn side by side are ratios to the frozen floor, on one floor for all."""

import copy
import dataclasses

import pytest
import synthetic_results as synthetic
from synthetic_results import step

from plots import extrapolation, figure5, laboratory, options, steps, tokens
from plots.floors import steady_seconds

METHODS = ("frozen", "lora", "s2ft_inplace")


def medians(entries: list[dict]) -> list[float | None]:
    return [seconds and seconds["median"] for seconds in steady_seconds(entries)]


def floor_of(**sizes) -> float:
    return step("any", "frozen", **sizes)["stats"]["median"]


def test_the_floor_is_the_median_of_all_of_a_size():
    entries = [
        step("figure5", "frozen", slowed=1.5),
        step("figure5", "lora", slowed=0.8),
        step("share", "lora", share=0.1, slowed=3.0),
        step("depth", "lora", full_depth=True, slowed=1.2),  # the floor is always at full depth
        step("depth", "full", full_depth=True, slowed=1.1),
    ]
    expected = [1.2 * floor_of() * ratio for ratio in (1, 1.15, 1.15 * 1.3, 1.15, 1.6)]
    assert medians(entries) == pytest.approx(expected)
    (first, *_) = steady_seconds(entries)
    assert first == pytest.approx(
        {
            name: 1.2 * floor_of() * ratio
            for name, ratio in (("median", 1), ("q1", 0.99), ("q3", 1.02))
        }
    )


@pytest.mark.parametrize(
    "other",
    [
        {"shape": "wide-1b"},
        {"layers": 2},
        {"vocab": 2880},
        {"batch": 2},
        {"length": 64},
        {"dtype": "bfloat16"},
        {"checkpointing": True},
        {"attention": "cudnn"},
        {"compile": True},
    ],
)
def test_another_size_or_another_option_has_a_floor_of_its_own(other):
    usual = [step("tokens", name, slowed=2.0) for name in METHODS]
    entries = [*usual, step("tokens", "frozen", **other, slowed=0.5)]
    alone = step("tokens", "frozen", **other)["extra_info"]
    (*_, seconds) = medians(entries)
    floor = 0.5 * alone["floor_seconds"]["median"]
    assert seconds == pytest.approx(floor * alone["ratio_to_floor"]["median"])
    assert medians(entries)[:3] == pytest.approx(medians(usual))


def test_a_copy_is_not_one_more_floor():
    slow, *others = (
        step("figure5", name, slowed=slowed)
        for name, slowed in zip(METHODS, (2.0, 1.0, 1.1), strict=True)
    )
    copies = [copy.deepcopy(slow) for _ in range(5)]
    for place, entry in enumerate(copies):
        entry |= {"group": f"suite {place}", "name": f"copy {place}"}
        entry["extra_info"]["copy_of"] = slow["name"]
    assert medians([slow, *others, *copies])[0] == pytest.approx(1.1 * floor_of())
    # and where its original is not in the file, it is what was measured
    assert medians(copies) == pytest.approx([2.0 * floor_of()] * 5)


def test_what_was_not_timed_has_no_seconds():
    entries = [step("density", "lora", status="out of memory"), step("density", "frozen")]
    entries.append(step("density", "spiel", share=0.1))  # counted only
    entries[-1]["stats"] = None
    for name in ("ratio_to_floor", "floor_seconds", "paired"):
        del entries[-1]["extra_info"][name]
    assert medians(entries) == [None, pytest.approx(floor_of()), None]


def laboratory_results(slowed: dict[str, float]) -> dict:
    """Every suite whose times are drawn, its methods timed while the machine was so slow."""
    sizes = {
        "figure5": [{}],
        "depth": [{"full_depth": True}],
        "checkpointing": [{"checkpointing": True}],
        "tokens": [{"length": 64}, {"length": 256}],
        "extrapolation": [{"layers": layers} for layers in (1, 2, 8)],
    }
    return synthetic.document(
        [
            step(suite, name, **size, slowed=slowed.get(name, 1.0))
            for suite, of_suite in sizes.items()
            for size in of_suite
            for name in (*METHODS, "full", "dora")
        ]
    )


def test_when_a_case_was_timed_changes_no_figure_and_no_table(tmp_path):
    """A case and its floor slow down together; three in five of each size are as fast as ever."""
    pages = []
    for name, slowed in (("quiet", {}), ("busy", {"lora": 1.4, "s2ft_inplace": 0.7})):
        document, folder = laboratory_results(slowed), tmp_path / name
        folder.mkdir()
        drawn = [
            path
            for figure in (figure5, options, tokens, extrapolation)
            for path in figure.draw(document, folder)
        ]
        pages.append({path.name: path.read_bytes() for path in drawn})
        pages[-1]["table"] = laboratory.tables(document)
    assert len(pages[0]) == 8
    assert pages[0] == pages[1]


def test_steps_of_all_suites_share_a_floor():
    """The same case is the same bar in the figure of every suite that has it."""
    document = laboratory_results({})
    alone = steps.read(document, "depth")
    document["benchmarks"] += [
        step("share", "lora", share=s / 100, slowed=9.0) for s in range(1, 20)
    ]
    slower = steps.read(document, "depth")
    assert [s.milliseconds() / t.milliseconds() for s, t in zip(slower, alone, strict=True)] == (
        pytest.approx([9.0] * len(alone))
    )
    assert [dataclasses.replace(s, seconds=None) for s in slower] == [
        dataclasses.replace(s, seconds=None) for s in alone
    ]
