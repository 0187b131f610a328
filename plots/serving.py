"""Serving: Figure 6 of the S2FT paper, and decoding for many tenants beside the base model."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from plots import paper, style
from plots.style import Look

# of results/<device>/figure6.json
KINDS = {
    "rows": Look("ours, rows", style.BLUE, "", "o"),
    "run": Look("ours, adjacent columns", style.NAVY, "", "s"),
    "columns": Look("ours, scattered columns", style.GREEN, "", "D"),
}
LORA = Look("LoRA", style.ORANGE, "", "^")
INPUTS = Look("ours, input channels", style.BLUE, "", "o")
OUTPUTS = Look("ours, output channels", style.GREEN, "", "D")
BYTES = Look("floor: its bytes", style.GREY, "", ".", ":")
LINES = Look("floor: its cache lines", style.GREY, "", "x", ":")
PAPER = {
    "S2FT": Look("S2FT, in the paper", "black", "", "+", "--"),
    "S2FT, input channels": Look("S2FT, in the paper", "black", "", "+", "--"),
    "S2FT, output channels": Look("S2FT, in the paper", "black", "", "+", "--"),
    "LoRA": Look("LoRA, in the paper", "black", "", "2", (0, (1, 2))),
}
# of results/<device>/tenants.json
METHODS = {
    "lora, peft": Look("LoRA, loop of PEFT", style.ORANGE, "", "^"),
    "lora, bmm": Look("LoRA, gather and bmm", style.RED, "", "v", "-."),
    "exported": Look("ours, exported to LoRA of rank 64", style.GREEN, "", "x", "--"),
    "lora, grouped": Look("LoRA, grouped as in Punica", style.PINK, "", "s", "--"),
    "ours": Look("ours", style.BLUE, "", "o"),
}


def draw(document: dict, folder: Path) -> list[Path]:
    """Figure 6, and what it costs to fuse."""
    caption = (
        "32 channels of a weight (d, d), or LoRAs of rank 16: equal bytes. Ours restores the base "
        "exactly. Switch and fuse: the floor is a copy of\nwhat is written; in parallel, to read "
        f"the adapters once. fp32, one thread. {style.machine(document)}.\nOf the paper: read off "
        "its curves; its devices are not named, and it restores nothing."
    )
    return [style.save(figure6(document), folder / "figure6.svg", caption)]


def draw_tenants(document: dict, folder: Path) -> list[Path]:
    resident = document["benchmarks"][0]["extra_info"]["resident"]
    caption = (
        "A step of 32 rows, adapters drawn anew by Zipf's law; hidden size 512, 4 layers, LoRAs of "
        f"rank 16, which have as many bytes. Ours has room for\n{resident} adapters on the device, "
        f"all others keep all. Medians and quartiles. {style.machine(document)}."
    )
    return [style.save(tenants(document), folder / "tenants.svg", caption)]


def figure6(document: dict) -> Figure:
    """Four panels of milliseconds: to switch on a GPU and on a CPU, in parallel, to fuse."""
    fig, axes = plt.subplots(2, 2, figsize=(style.WIDTH, 6.4))
    here = "GPU" if document["machine_info"]["gpu"] else "CPU"
    for panel, letter, device in zip(axes[0], "ab", ("GPU", "CPU"), strict=True):
        ours = _found(document, "bench_switch") if device == here else []
        title = f"{letter}: switch on a {device}" + ("" if ours else ", the paper alone")
        _over_sizes(panel, ours, title)
        _lines(panel, paper.SIZES, {PAPER[k]: v for k, v in paper.SWITCH[device].items()})
    _parallel(axes[1][0], _found(document, "bench_parallel"))
    _over_sizes(axes[1][1], _found(document, "bench_fuse"), f"fuse two adapters, on a {here}")
    entries: dict[str, object] = {}
    for panel in axes.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    for row in axes:
        row[0].set_ylabel("milliseconds")
    style.legend(fig, entries, columns=4, bottom=0.42)
    return fig


def tenants(document: dict) -> Figure:
    """Time of a step over that of the base, over the number of adapters, for each method."""
    fig, panel = plt.subplots(figsize=(style.WIDTH, 3.6))
    found = sorted((entry["extra_info"] for entry in document["benchmarks"]), key=_adapters)
    for name, look in METHODS.items():
        points = [(e["adapters"], e["over_base"][name]) for e in found if name in e["over_base"]]
        medians = [ratio["median"] for _, ratio in points]
        below = [ratio["median"] - ratio["q1"] for _, ratio in points]
        above = [ratio["q3"] - ratio["median"] for _, ratio in points]
        panel.errorbar(
            [number for number, _ in points], medians, (below, above), capsize=2, **_line(look)
        )
    panel.axhline(1, color="#777777", linestyle=":", linewidth=1.2, label="base")
    panel.axvline(found[0]["resident"], color="#777777", linewidth=0.8)
    _scale(panel, [entry["adapters"] for entry in found], "adapters that are served")
    panel.set_ylabel("time of a step / base")
    handles, labels = panel.get_legend_handles_labels()
    style.legend(fig, dict(zip(labels, handles, strict=True)), columns=3, bottom=0.3)
    return fig


def _adapters(info: dict) -> int:
    return info["adapters"]


def _found(document: dict, function: str) -> list[dict]:
    entries = [e for e in document["benchmarks"] if e["name"].partition("[")[0] == function]
    return [entry["extra_info"] for entry in entries]


def _over_sizes(panel: Axes, found: list[dict], title: str) -> None:
    """Ours by kind, LoRA, and the floors of bytes and of cache lines, over d."""
    for kind, look in KINDS.items():
        of_kind = sorted((e for e in found if e["kind"] == kind), key=lambda e: e["size"])
        sizes = [entry["size"] for entry in of_kind]
        series = {look: [e["seconds"]["ours"] * 1e3 for e in of_kind]}
        if kind != "run":
            floor = BYTES if kind == "rows" else LINES
            series[floor] = [e["seconds"]["floor"] * 1e3 for e in of_kind]
        if kind == "rows":
            series[LORA] = [e["seconds"]["lora"] * 1e3 for e in of_kind]
        _lines(panel, sizes, series)
    _scale(panel, list(paper.SIZES), "d")
    panel.set_yscale("log")
    panel.set_title(title, loc="left", weight="bold")


def _parallel(panel: Axes, found: list[dict]) -> None:
    found = sorted(found, key=_adapters)
    names = {"ours": INPUTS, "ours, output channels": OUTPUTS, "lora": LORA, "floor": BYTES}
    _lines(
        panel,
        [entry["adapters"] for entry in found],
        {look: [e["seconds"][name] * 1e3 for e in found] for name, look in names.items()},
    )
    for name, values in paper.PARALLEL.items():
        _lines(panel, paper.ADAPTERS, {PAPER[name]: values})
    _scale(panel, list(paper.ADAPTERS), "adapters, a token for each")
    panel.set_yscale("log")
    panel.set_title("c: in parallel, d = 2048", loc="left", weight="bold")


def _lines(panel: Axes, x, series: dict[Look, list[float] | tuple[float, ...]]) -> None:
    for look, y in series.items():
        if len(y):
            panel.plot(x, y, **_line(look))


def _line(look: Look) -> dict:
    return {
        "label": look.label,
        "color": look.color,
        "marker": look.marker,
        "markersize": 4.5,
        "linestyle": look.dashes,
    }


def _scale(panel: Axes, ticks: list[int], label: str) -> None:
    panel.set_xscale("log")
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel(label)
