"""The table and the figure of plans are those of their file."""

import json

import synthetic_results as synthetic

from plots import draw_all, plan, tables

GIB = 2**30


def entry(method: str, activations: int) -> dict:
    step = {"activations": activations, "gathers": 5, "gathered": 3 * GIB, "scatters": 2}
    step["scattered"] = GIB // 4
    return {
        "name": f"m on 8: {method}",
        "params": {"model": "m", "gpus": 8, "method": method, "sequences": 1, "tokens": 64},
        "extra_info": {
            **{"trained": 2_500_000, "weights": GIB, "gradients": GIB // 2, "optimizer": GIB},
            **{"plain": step, "checkpointed": {**step, "activations": activations // 2}},
            "seconds": {"checkpointed": {"computing": 1.5, "exchanging": 0.25}},
        },
    }


def document() -> dict:
    return synthetic.document([]) | {"benchmarks": [entry("full", 8 * GIB), entry("s2ft", GIB)]}


def test_a_row_has_the_numbers_of_its_plan():
    _, _, s2ft = plan.rows(document())
    assert s2ft == [
        *("m", "8", "s2ft", "2.5", "1,024", "512", "1,024", "1.00", "0.50"),
        *("5", "3.0", "2", "0.25", "1.50 to 1.75"),
    ]


def test_the_table_and_the_figure_are_made_from_the_file(tmp_path):
    (tmp_path / "predicted").mkdir()
    (tmp_path / "predicted" / "plan.json").write_text(json.dumps(document()))
    page = tmp_path / "page.md"
    page.write_text("<!-- plan -->\n<!-- /plan -->\n")
    assert "| m | 8 | s2ft | 2.5 |" in tables.update(page, tmp_path)
    (figure,) = draw_all(tmp_path, tmp_path / "out")
    assert figure == tmp_path / "out" / "predicted" / "plan.svg" and figure.is_file()
    first = figure.read_bytes()
    draw_all(tmp_path, tmp_path / "out")
    assert figure.read_bytes() == first
