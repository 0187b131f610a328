"""Figures are a function of the JSON and of nothing else."""

import html
import json
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import synthetic_results as synthetic

import plots
from plots import demo, tables
from plots.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def document() -> dict:
    """A results file of the demo with made-up numbers."""
    methods = [
        ("full", 1.4, 1000, 2),
        ("lora", 1.3, 100, 3),
        ("spiel", 1.5, 100, 3),
        ("s2ft inplace", 1.01, 100, 1),
        ("s2ft additive", 1.02, 100, 1),
        ("s2ft permuted inplace", 1.01, 100, 1),
        ("s2ft permuted additive", 1.02, 100, 1),
        ("s2ft small", 1.005, 10, 1),
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


LABORATORY = {
    "cpu": [
        *("checkpointing-small", "density-small", "depth-small", "depth-wide-1b"),
        *("extrapolation-memory-small", "extrapolation-time-small"),
        *("figure5-small", "figure5-wide-1b", "host", "kernels", "peak-small", "peak-wide-1b"),
        *("share-memory-small", "share-time-small", "tokens-memory-small", "tokens-time-small"),
    ],
    "testing-gpu": [
        *(f"figure5-llama-2-{size}" for size in ("13b", "7b")),
        "kernels",
        *(f"peak-llama-2-{size}" for size in ("13b", "7b")),
        *(f"tokens-{what}-llama-2-{size}" for what in ("memory", "time") for size in ("13b", "7b")),
    ],
}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory) -> Path:
    """Results of the laboratory on two devices."""
    folder = tmp_path_factory.mktemp("results")
    files = {
        "cpu/steps": synthetic.cpu_steps(),
        "cpu/host": synthetic.host(),
        "cpu/ops": synthetic.ops(synthetic.CPU, ["small M=256"], ["torch"]),
        "testing-gpu/steps": synthetic.gpu_steps(),
        "testing-gpu/ops": synthetic.ops(synthetic.GPU, ["a M=1", "b M=2"], ["torch", "triton"]),
    }
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def drawn(laboratory, tmp_path_factory) -> list[Path]:
    """The figures of both devices."""
    return plots.draw_all(laboratory, tmp_path_factory.mktemp("figures"))


def texts(figure: Path) -> str:
    """What a reader reads: matplotlib writes each line of text as a comment beside its glyphs."""
    return "\n".join(html.unescape(t) for t in re.findall("<!-- (.*?) -->", figure.read_text()))


@pytest.mark.slow
def test_figures_of_the_laboratory(laboratory, drawn, tmp_path):
    """All are drawn, say what they ran on, and are the same bytes in another process."""
    names = [f"{device}/{name}.svg" for device, names in LABORATORY.items() for name in names]
    assert sorted(f"{figure.parent.name}/{figure.name}" for figure in drawn) == sorted(names)

    command = [sys.executable, "-m", "plots", "--results", str(laboratory), "--out"]
    subprocess.run([*command, str(tmp_path)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for figure in drawn:
        again = tmp_path / figure.parent.name / figure.name
        assert figure.read_bytes() == again.read_bytes()
        assert not re.search(r"20\d\d-\d\d-\d\d|<dc:date>", figure.read_text())
        machine = "Testing CPU, 2 cores" if figure.parent.name == "cpu" else "Testing GPU 9000"
        assert machine in texts(figure)


UNITS = {
    "figure5": ["time of a step, ms", "peak memory of a step, ", "median and quartiles"],
    "peak": ["memory at the peak of a step, ", "saved activations", "peak of the first step"],
    "tokens-time": ["time per token, µs", "tokens of a step", "frozen floor"],
    "tokens-memory": ["peak memory, ", "tokens of a step", "measured"],
    "share-time": ["step / frozen floor", "trained share of all parameters of small, %"],
    "share-memory": ["peak memory, MiB", "frozen floor"],
    "density": ["peak above the frozen floor, MiB", "of small", "bytes an entry"],
    "checkpointing": ["time of a step, ms", "peak memory of a step, MiB", "checkpointing", "plain"],
    "depth": ["time of a step, ms", "full depth", "plain"],
    "extrapolation-time": ["time of a step, ms", "layers of small", "extrapolated from two cuts"],
    "extrapolation-memory": ["peak memory, MiB", "layers of small", "extrapolated from two cuts"],
    "host": ["host time of a layer / frozen floor", "1.540  (1.08 ms)", "median and quartiles"],
    "kernels": ["achieved share of the ceiling, %"],
}


@pytest.mark.slow
def test_labels_have_units(drawn):
    for kind, wanted in UNITS.items():
        figures = [figure for figure in drawn if figure.stem.startswith(kind)]
        assert figures
        for figure in figures:
            text = texts(figure)
            assert all(label in text for label in wanted), (figure, text)
    gpu = {f.stem: texts(f) for f in drawn if f.parent.name == "testing-gpu"}
    for kind in ("figure5-llama-2-", "peak-llama-2-", "tokens-memory-llama-2-"):
        assert ", GiB" in gpu[f"{kind}7b"]
        assert "OOM" in gpu[f"{kind}13b"] and "OOM" not in gpu[f"{kind}7b"]
    assert "printed in the paper, A100-80G" in gpu["tokens-time-llama-2-7b"]
    for figure in drawn:
        ratios = "Times: ratio to the frozen floor of the same rounds" in texts(figure)
        assert ratios == ("time of a step" in texts(figure) or "per token" in texts(figure))
    cpu = {f.stem: texts(f) for f in drawn if f.parent.name == "cpu"}
    assert "n/a" in cpu["figure5-small"] and "not available" in cpu["figure5-small"]
    assert "paper" not in cpu["tokens-time-small"]


def test_main_draws_every_figure_as_svg(results, tmp_path, capsys):
    out = tmp_path / "figures"
    assert main(["--results", str(results), "--out", str(out)]) == 0
    figures = sorted((out / "cpu").iterdir())
    assert [f.name for f in figures] == ["demo-losses.svg", "demo-memory.svg", "demo-step-time.svg"]
    assert sorted(capsys.readouterr().out.split()) == [str(f) for f in figures]
    for figure in figures:
        assert xml.etree.ElementTree.parse(figure).getroot().tag.endswith("svg")


@pytest.mark.slow
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
    arguments = ["--results", str(results), "--out", str(tmp_path), "--pages", str(page)]
    with pytest.raises(SystemExit):
        main([*arguments, "--check"])
    assert "make plots" in capsys.readouterr().err
    assert main(arguments) == 0 and main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| lora | 100 | 1.300 (1.290 to 1.320) |" in text
    assert "Testing CPU, 2 cores" in text

    old = page.read_text()
    stale = document()
    stale["benchmarks"][1]["extra_info"]["trained_parameters"] = 101
    (results / "cpu" / "demo.json").write_text(json.dumps(stale))
    with pytest.raises(SystemExit):
        main([*arguments, "--check"])
    assert page.read_text() == old


PLACE = "<!-- {0} -->\n<!-- /{0} -->\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no place for a table", "must have a place for a table"),
        (PLACE.format("demo tpu"), "must be of .*, got 'demo tpu'"),
        (PLACE.format("steps cpu"), "cpu/steps.json, which does not exist"),
        (2 * PLACE.format("demo cpu"), "one closed place for the table 'demo cpu'"),
        ("<!-- demo cpu -->\nnot closed\n", "one closed place for the table 'demo cpu'"),
    ],
)
def test_a_page_with_a_wrong_place_is_refused(text, message, results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=message):
        main(["--results", str(results), "--out", str(tmp_path), "--pages", str(page)])
    assert page.read_text() == text


def test_tables_of_the_steps(laboratory, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PLACE.format("steps cpu") + PLACE.format("steps gpu"))
    text = tables.update(page, laboratory)
    cpu, gpu = text.split("<!-- /steps cpu -->")
    assert "**small, float32, length 128, batch 2:**" in cpu
    assert "saved, MiB | peak, MiB |" in cpu and "Testing CPU" in cpu

    step = synthetic.step("figure5", "lora", batch=2)
    sizes, seconds = step["extra_info"]["bytes"], step["stats"]["median"]
    row = next(line for line in cpu.splitlines() if line.startswith("| lora |"))
    assert row.split(" | ")[1:] == [
        *("200,000 (0.80%)", f"{seconds * 1e3:.4g}", "1.150 (1.140 to 1.170)", ""),
        *(f"{sizes['saved'] / 2**20:.4g}", f"{sizes['peak'] / 2**20:.4g} |"),
    ]
    row = next(line for line in cpu.splitlines() if line.startswith("| galore |"))
    assert row.split(" | ")[1:3] == ["", "n/a"] and row.count("n/a") == 2
    assert "unavailable: galore_torch is not installed (galore)." in cpu

    assert gpu.index("**llama-2-7b,") < gpu.index("**llama-2-13b,") < gpu.index("Testing GPU")
    assert "length 1,024, batch 2:**" in gpu and "peak, GiB" in gpu and gpu.count("| OOM |") == 4


def test_the_short_table_is_the_first_of_the_steps(laboratory, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PLACE.format("steps cpu, short"))
    lines = tables.update(page, laboratory).splitlines()
    assert lines[1] == "small, float32, length 128, batch 2:"
    assert lines[3] == "| method | step / floor | at equal depth | saved, MiB | peak, MiB |"
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines[5:-3]}
    assert rows["lora"][1:3] == ["1.15", ""] and "galore" not in rows


def test_the_table_of_a_cut_says_what_equal_depth_costs(laboratory, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PLACE.format("steps cpu"))
    title = "**wide-1b, 2 of 22 layers, 2,880 of 32,000 tokens of the vocabulary, float32"
    _, table = tables.update(page, laboratory).split(title)
    head = next(line for line in table.splitlines() if line.startswith("| method |")).split(" | ")
    rows = {line.split(" | ")[0]: line.split(" | ") for line in table.splitlines()[4:]}
    place = head.index("equal depth / floor")
    assert rows["| frozen floor"][place] == rows["| full"][place] == ""
    at_depth = synthetic.step("depth", "lora", **synthetic.WIDE, full_depth=True)["extra_info"]
    median = at_depth["ratio_to_floor"]["median"]
    assert rows["| lora"][place].startswith(f"{median:.3f} (")
    assert len(rows["| lora"]) == len(head)


def test_without_results_of_a_gpu_the_table_says_so(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PLACE.format("steps gpu"))
    assert "Not measured on a GPU yet; `bench/gpu.sh OUT_DIR`" in tables.update(page, results)


def test_running_mean():
    assert demo.running_mean([1.0, 3.0, 5.0], 2) == [2.0, 4.0]
    assert demo.running_mean([1.0, 3.0], 1) == [1.0, 3.0]
