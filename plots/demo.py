"""Figures of `python -m bench.demo`: step time, memory, losses."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from plots import style

FLOOR = style.METHODS["frozen"].label
# By their names in the results, from the top.
LOOK = {
    style.METHODS[name].label: style.METHODS[name]
    for name in (
        *("full", "lora", "spiel", "s2ft_inplace", "s2ft_additive"),
        *("s2ft_permuted_inplace", "s2ft_permuted_additive", "frozen"),
    )
} | {"s2ft small": style.Look("s2ft small", style.PINK, "..", "*", "-.")}
PARTS = ("weights", "saved", "gradients", "optimizer")


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws all figures of one results file into `folder`; returns their paths."""
    benchmarks = {entry["name"]: entry for entry in document["benchmarks"]}
    methods = {name: entry for name, entry in benchmarks.items() if name in LOOK}
    params = benchmarks[FLOOR]["params"]
    parameters = benchmarks["pre-training"]["extra_info"]["parameters"]
    caption = (
        f"Llama of {parameters / 1e6:.2f} M parameters, {params['dtype']}, "
        f"{params['tokens']} tokens a step. {style.machine(document)}"
    )
    return [
        style.save(figure(methods), folder / f"demo-{name}.svg", caption)
        for name, figure in (("step-time", step_time), ("memory", memory), ("losses", losses))
    ]


def step_time(methods: dict) -> Figure:
    """Bars: step time over the frozen floor's in the same round, median and quartiles."""
    ratios = {name: entry["extra_info"]["ratio_to_floor"] for name, entry in methods.items()}
    notes = [f"({entry['stats']['median'] * 1e3:.3g} ms)" for entry in methods.values()]
    label = "step time / frozen floor, of the same round (median and quartiles)"
    return style.ratio_bars(ratios, LOOK, notes, label)


def memory(methods: dict) -> Figure:
    """Stacked bars: MiB of weights, saved activations, gradients and optimizer state."""
    fig, axes = plt.subplots(figsize=(6.8, 1.2 + 0.27 * len(methods)))
    left = [0.0] * len(methods)
    for part in PARTS:
        sizes = [entry["extra_info"]["bytes"][part] / 2**20 for entry in methods.values()]
        look = style.PARTS[part]
        axes.barh(range(len(methods)), sizes, 0.68, left, label=look.label, **look.bar)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    right = max(left)
    for place, total in enumerate(left):
        axes.text(total + right * 0.015, place, f"{total:.1f}", va="center", fontsize=8)
    axes.set(yticks=range(len(methods)), yticklabels=list(methods), xlim=(0, right * 1.1))
    axes.set_xlabel("memory of a step, MiB (counted in whole storages)")
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.42, 1.0), handlelength=1.4)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    return fig


def losses(methods: dict) -> Figure:
    """Curves: training loss (running mean) and held-out loss over the steps."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.9))
    trained = {name: entry["extra_info"] for name, entry in methods.items() if name != FLOOR}
    for name, extra in trained.items():
        look = LOOK[name]
        color = "#777777" if name == "full" else look.color
        width = max(1, len(extra["losses"]) // 12)
        smooth = running_mean(extra["losses"], width)
        left.plot(range(width, width + len(smooth)), smooth, color=color, linestyle=look.dashes)
        held_out = extra["held_out"]
        drawn = {"color": color, "linestyle": look.dashes, "marker": look.marker, "markersize": 5}
        label = f"{name}, {extra['trained_parameters']:,} trained"
        right.plot(held_out["steps"], held_out["losses"], label=label, **drawn)
    left.set(xlabel="step", ylabel="training loss, nats per byte")
    left.set_title(f"training, mean of {width} steps")
    right.set(xlabel="step", ylabel="held-out loss, nats per byte", title="held out")
    fig.legend(loc="lower center", bbox_to_anchor=(0.5, 0.05), ncols=2)
    fig.tight_layout(rect=(0, 0.24, 1, 1))
    return fig


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of every `width` consecutive values."""
    return [sum(values[start : start + width]) / width for start in range(len(values) - width + 1)]
