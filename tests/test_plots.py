"""Figures are a function of the JSON and of nothing else."""

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

import plots
from plots import demo
from plots.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


def document() -> dict:
    """A results file of the demo with made-up numbers."""
    methods = [
        ("full", 1.4, 1000, 2),
        ("lora", 1.3, 100, 3),
        ("s2ft inplace", 1.01, 10, 1),
        ("s2ft additive", 1.02, 10, 1),
        ("frozen floor", 1.0, 0, 0),
    ]
    entries = [
        {
            "name": name,
            "params": {"dtype": "float32", "tokens": 64},
            "stats": {"median": 0.1 * ratio},
            "extra_info": {
                "trained_parameters": trained,
                "ratio_to_floor": {"median": ratio, "q1": ratio - 0.01, "q3": ratio + 0.02},
                "bytes": {
                    "weights": 4000,
                    "gradients": 4 * trained,
                    "optimizer": 8 * trained,
                    "saved": 5000,
                    "unseen": 0,
                },
                "losses": [3.0 - slope * step / 100 for step in range(20)],
                "held_out": {"steps": [0, 10, 20], "losses": [3.0, 3 - slope / 10, 3 - slope / 5]},
            },
        }
        for name, ratio, trained, slope in methods
    ]
    entries.append({"name": "pre-training", "extra_info": {"parameters": 1000}})
    cpu = {"brand_raw": "Testing CPU", "count": 2}
    versions = {"torch": "2.13.0", "triton": "3.7.1", "transformers": "5.0", "peft": "0.20"}
    return {"machine_info": {"cpu": cpu, "gpu": None, **versions}, "benchmarks": entries}


@pytest.fixture
def results(tmp_path) -> Path:
    folder = tmp_path / "results"
    (folder / "cpu").mkdir(parents=True)
    (folder / "cpu" / "demo.json").write_text(json.dumps(document()))
    return folder


def test_main_draws_every_figure_as_svg(results, tmp_path, capsys):
    out = tmp_path / "figures"
    assert main(["--results", str(results), "--out", str(out)]) == 0
    figures = sorted((out / "cpu").iterdir())
    assert [f.name for f in figures] == ["demo-losses.svg", "demo-memory.svg", "demo-step-time.svg"]
    assert sorted(capsys.readouterr().out.split()) == [str(f) for f in figures]
    for figure in figures:
        assert xml.etree.ElementTree.parse(figure).getroot().tag.endswith("svg")


def test_figures_are_the_same_bytes_in_every_process(results, tmp_path):
    first = plots.draw_all(results, tmp_path / "first")
    command = [sys.executable, "-m", "plots", "--results", str(results), "--out"]
    subprocess.run(
        [*command, str(tmp_path / "second")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    for figure in first:
        second = tmp_path / "second" / figure.relative_to(tmp_path / "first")
        assert figure.read_bytes() == second.read_bytes()


def test_figures_follow_the_numbers(results, tmp_path):
    [before, *_] = plots.draw_all(results, tmp_path / "before")
    changed = document()
    changed["benchmarks"][0]["extra_info"]["ratio_to_floor"]["median"] = 1.401
    (results / "cpu" / "demo.json").write_text(json.dumps(changed))
    [after, *_] = plots.draw_all(results, tmp_path / "after")
    assert before.name == after.name and before.read_bytes() != after.read_bytes()


def test_other_results_are_left_alone(results, tmp_path):
    (results / "cpu" / "another.json").write_text("{}")
    assert len(plots.draw_all(results, tmp_path / "figures")) == 3


def test_main_says_where_nothing_was_found(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--results", str(tmp_path)])
    assert stop.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_plots_needs_neither_torch_nor_s2kernels():
    code = "import sys, plots; assert not {'torch', 's2kernels', 'bench'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_tables_of_a_page_are_those_of_the_results(results, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- demo cpu -->\nold\n<!-- /demo cpu -->\nafter\n")
    arguments = ["--results", str(results), "--out", str(tmp_path), "--readme", str(page)]
    with pytest.raises(SystemExit):
        main([*arguments, "--check"])
    assert "make plots" in capsys.readouterr().err
    assert main(arguments) == 0 and main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| lora | 100 | 130.0 | 1.300 (1.290 to 1.320) |" in text
    assert "Testing CPU, 2 cores" in text

    page.write_text("no place for a table")
    with pytest.raises(ValueError, match="one place for the table 'demo cpu', got 0"):
        main(arguments)


def test_running_mean():
    assert demo.running_mean([1.0, 3.0, 5.0], 2) == [2.0, 4.0]
    assert demo.running_mean([1.0, 3.0], 1) == [1.0, 3.0]
