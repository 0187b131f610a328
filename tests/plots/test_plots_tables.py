"""What the tables of the steps say about themselves, and which models have one."""

import pytest
import synthetic_results as synthetic
from synthetic_results import step

from plots import tables


def floor(ratio: float, **sizes) -> dict:
    """A frozen floor that came out at `ratio` beside another one."""
    entry = step("figure5", "frozen", **sizes)
    entry["extra_info"]["ratio_to_floor"]["median"] = ratio
    return entry


def paragraph(entries: list[dict], start: str) -> str | None:
    found = tables.laboratory(synthetic.document(entries)).split("\n\n")
    return next((text for text in found if text.startswith(start)), None)


@pytest.mark.parametrize(
    ("ratios", "between", "below"),
    [
        ([1.0228], "at 1.023.", "below 2.3%,"),
        ([0.9916, 1.0019, 1.0052], "at 0.992 to 1.005.", "below 0.8%,"),
    ],
)
def test_the_resolution_is_that_of_the_floors_beside_themselves(ratios, between, below):
    floors = [floor(ratio, batch=batch) for batch, ratio in enumerate(ratios, start=1)]
    others = [step("figure5", "lora"), step("figure5", "full", batch=2)]
    missing = step("tokens", "frozen", length=4096, status="out of memory")
    note = paragraph([*floors, *others, missing], "Times: ratio to the frozen floor")
    assert f"an identical one came out {between} Differences {below}" in note


def test_without_a_floor_there_is_no_resolution():
    assert "Resolution" not in paragraph([step("figure5", "lora")], "Times")


def test_host_times_are_in_the_order_of_the_figures():
    rows = tables.host_times(synthetic.host()).splitlines()
    assert rows[2:5] == [
        "| frozen floor | 0.707 | 1.010 (0.990 to 1.040) |",
        "| lora | 1.337 | 1.910 (1.890 to 1.940) |",
        "| s2ft inplace | 1.078 | 1.540 (1.520 to 1.570) |",
    ]
    assert rows[-1].startswith("Testing CPU, 2 cores")


def test_each_cut_of_a_shape_has_a_table():
    cuts = [{"layers": 2}, {"layers": 2, "vocab": 2880}, {"dtype": "bfloat16"}, {}]
    entries = [
        step("tokens", name, batch=batch, **cut)
        for cut in cuts
        for batch in (1, 2)
        for name in ("frozen", "lora")
    ]
    text = tables.laboratory(synthetic.document(entries))
    headings = [line for line in text.splitlines() if line.startswith("**")]
    assert sorted(heading for heading in headings) == [
        "**small, 2 of 8 layers, 2,880 of 32,000 tokens of the vocabulary, float32, "
        "length 128, batch 2:**",
        "**small, 2 of 8 layers, float32, length 128, batch 2:**",
        "**small, bfloat16, length 128, batch 2:**",
        "**small, float32, length 128, batch 2:**",
    ]
    for heading in headings:
        _, _, below = text.partition(heading)
        rows = below.split("\n\n")[1].splitlines()[2:]
        assert [row.split(" | ")[0] for row in rows] == ["| frozen floor", "| lora"]
