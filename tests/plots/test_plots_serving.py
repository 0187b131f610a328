"""Figures of serving: every series is that of the results or of the paper, and says which."""

import pytest
import synthetic_results as synthetic

from plots import paper, serving


def document(entries: list[dict], gpu: str | None = None) -> dict:
    found = synthetic.document([])
    found["machine_info"] = {**found["machine_info"], "gpu": gpu}
    return {**found, "benchmarks": entries}


def switches(function: str) -> list[dict]:
    return [
        {
            "name": f"{function}[{kind}-{size}]",
            "extra_info": {
                "kind": kind,
                "size": size,
                "seconds": {"ours": size * 1e-8, "lora": size * 1e-6, "floor": size * 1e-9},
            },
        }
        for kind in ("rows", "columns")
        for size in (4096, 1024)
    ]


def parallel() -> list[dict]:
    names = ("ours", "ours, output channels", "lora", "floor")
    return [
        {
            "name": f"bench_parallel[{number}]",
            "extra_info": {"adapters": number, "seconds": {name: number * 1e-6 for name in names}},
        }
        for number in (1, 10)
    ]


def lines(axes) -> dict[str, tuple[list, list]]:
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
    }


@pytest.mark.parametrize(("gpu", "measured"), [(None, 1), ("Testing GPU", 0)])
def test_figure_6_has_ours_beside_the_paper_on_the_device_of_the_results(gpu, measured):
    entries = [*switches("bench_switch"), *switches("bench_fuse"), *parallel()]
    fig = serving.figure6(document(entries, gpu))
    a, b, c, fuse = fig.axes
    for place, (panel, device) in enumerate(((a, "GPU"), (b, "CPU"))):
        found = lines(panel)
        for method in ("S2FT", "LoRA"):
            x, y = found[serving.PAPER[method].label]
            assert (tuple(x), tuple(y)) == (paper.SIZES, paper.SWITCH[device][method])
        assert ("ours, rows" in found) == (place == measured)
        assert ("the paper alone" in panel.get_title(loc="left")) == (place != measured)
    x, y = lines((a, b)[measured])["ours, rows"]
    assert x == [1024, 4096] and y == pytest.approx([1024e-5, 4096e-5])
    assert lines(fuse)["LoRA"][1] == pytest.approx([1.024, 4.096])
    assert lines(c)[serving.INPUTS.label] == ([1, 10], pytest.approx([1e-3, 1e-2]))
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert {"floor: its bytes", "floor: its cache lines", "S2FT, in the paper"} <= set(labels)


def test_tenants_are_drawn_over_the_base_with_quartiles(tmp_path):
    def info(number: int) -> dict:
        ratios = {"ours": 1.1, "lora, bmm": 1.5} | ({"lora, peft": 2.0} if number < 100 else {})
        over_base = {n: {"median": r, "q1": r - 0.1, "q3": r + 0.2} for n, r in ratios.items()}
        return {"adapters": number, "resident": 64, "over_base": over_base}

    entries = [{"name": "bench_tenants", "extra_info": info(number)} for number in (128, 8)]
    axes = serving.tenants(document(entries)).axes[0]
    drawn = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    assert drawn["ours"] == [[8, 1.1], [128, 1.1]]
    assert drawn["LoRA, loop of PEFT"] == [[8, 2.0]]
    (path,) = serving.draw_tenants(document(entries), tmp_path)
    assert path.read_text().startswith("<?xml")
