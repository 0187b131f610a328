"""Lines of a figure run along what it says on its axis, and sizes are not mixed on them."""

import pytest
import synthetic_results as synthetic
from synthetic_results import step

from plots import density, lines, steps


def names(entries: list[dict], *along: str) -> dict[str, int]:
    """How many steps there are in each figure of a suite."""
    found = steps.series(synthetic.document(entries), "tokens", *along)
    return {name: len(of_figure) for name, of_figure in found}


def test_a_figure_has_steps_of_one_size_but_for_what_its_lines_run_along():
    cut, whole = (
        [
            step("tokens", name, length=length, vocab=vocab)
            for name in ("frozen", "lora")
            for length in (64, 128, 256)
        ]
        for vocab in (2880, 32_000)
    )
    by_length = {f"small-length-{length}": 2 for length in (64, 128, 256)}
    assert names(cut, "length", "batch") == {"small": 6}
    assert names(cut, "batch") == by_length
    entries = cut + whole
    assert names(entries, "length") == {"small-vocab-2880": 6, "small-vocab-32000": 6}
    entries += [step("tokens", "lora", shape="wide-1b", length=1024, dtype="bfloat16")]
    entries += [step("tokens", "lora", batch=4, dtype="bfloat16")]
    assert names(entries, "length", "layers") == {
        "small-vocab-2880-batch-1-dtype-float32": 6,
        "small-vocab-32000-batch-1-dtype-float32": 6,
        "small-vocab-32000-batch-4-dtype-bfloat16": 1,
        "wide-1b": 1,
    }


def test_two_vocabularies_are_extrapolated_apart(tmp_path):
    """One of them ten times as slow: a line through the cuts of both would run elsewhere."""
    slowed = {2880: 10.0, 32_000: 1.0}
    entries = [
        step("extrapolation", name, layers=layers, vocab=vocab, slowed=slowed[vocab])
        for vocab in slowed
        for layers in (1, 2, 8)
        for name in ("frozen", "full")
    ]
    drawn = lines.draw(synthetic.document(entries), tmp_path)
    assert sorted(path.stem for path in drawn) == [
        f"extrapolation-{quantity}-small-vocab-{vocab}"
        for quantity in ("memory", "time")
        for vocab in (2880, 32000)
    ]
    for name, found in steps.series(synthetic.document(entries), "extrapolation", "layers"):
        (panel,) = [axes for axes in lines.over_layers(found)["time"][0].axes if axes.axison]
        drawn = {line.get_label(): line for line in panel.lines}
        vocab = int(name.removeprefix("small-vocab-"))
        expected = [
            slowed[vocab] * 1e3 * step("any", "full", layers=n)["stats"]["median"]
            for n in (1, 2, 8)
        ]
        assert list(drawn["measured"].get_ydata()) == pytest.approx(expected)
        end = expected[0] + 7 * (expected[1] - expected[0])
        assert drawn["extrapolated from two cuts"].get_ydata()[0] == pytest.approx(end)


@pytest.mark.parametrize("suite", ["tokens", "share", "density"])
def test_every_figure_of_lines_keeps_two_cuts_apart(suite, tmp_path):
    entries = [
        step(suite, name, layers=layers, share=None if name == "frozen" else 0.01)
        for layers in (1, 2)
        for name in ("frozen", "spiel")
    ]
    draw = density.draw if suite == "density" else lines.draw
    drawn = draw(synthetic.document(entries), tmp_path)
    ends = {path.stem.rpartition("small")[2] for path in drawn}
    assert ends == {"-layers-1", "-layers-2"} and len(drawn) in (2, 4)
    (alone, *_) = draw(synthetic.document(entries[2:]), tmp_path)
    assert alone.stem.endswith("-small")
