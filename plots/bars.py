"""Horizontal bars: step time and peak memory of methods, and what the peak is made of."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from plots import steps, style
from plots.steps import Step

Setting = TypeVar("Setting")
HEIGHT = 0.72  # of a bar, where the next is 1 below
# Of the options of a figure, in their order.
LOOKS = (
    (style.BLUE, ""),
    (style.ORANGE, "////"),
    (style.GREEN, "...."),
    (style.YELLOW, "xxxx"),
    (style.PINK, "||||"),
    (style.GREY, "\\\\\\\\"),
)
FIRST = {"linestyle": "none", "marker": "|", "markersize": 10, "color": "black"}
OF_OPTIONS = ("checkpointing", "options", "depth")  # suites
PEAK_NOTE = "Of saved activations and gradients the larger is drawn."


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws Figure 5 and the peaks of each of its models, and what options change."""
    written = []
    for name, suite, figure, note in (
        ("figure5", "figure5", time_and_memory, steps.NOTE),
        ("peak", "figure5", peaks, PEAK_NOTE),
        *((suite, suite, time_and_memory, steps.NOTE) for suite in OF_OPTIONS),
    ):
        for shape, found in steps.series(document, suite, *steps.SIZES):
            caption = steps.caption(document, found, note)
            written.append(style.save(figure(found), folder / f"{name}-{shape}.svg", caption))
    return written


def time_and_memory(found: list[Step]) -> Figure:
    """Left the time of a step, right its peak memory; a row of panels for each length and batch.

    The arrangement follows Figure 5 of the S2FT paper. Where the steps differ in their options,
    each method has a bar for each of these; else each method has its own look.
    """
    options = sorted({step.options for step in found})
    if len(options) > len(LOOKS):
        raise ValueError(f"a figure can tell {len(LOOKS)} options apart, got {options}")
    looks = {
        option: style.Look(option or "plain", *look)
        for option, look in zip(options, LOOKS, strict=False)
    }
    settings = list(steps.groups(found, lambda step: step.size).values())
    inches = 0.165 if len(options) == 1 else 0.13 * len(options) + 0.08
    fig, rows = panels([inches * len({s.method for s in group}) for group in settings])
    height = HEIGHT if len(options) == 1 else 0.84 / len(options)
    for (left, right), of_setting in zip(rows, settings, strict=True):
        methods = method_names(left, of_setting)
        method_names(right, of_setting, shown=False)
        unit, name = steps.byte_unit(of_setting)
        for step in of_setting:
            lane = options.index(step.options) - (len(options) - 1) / 2
            place = methods.index(step.method) + lane * height
            look = style.METHODS[step.method] if len(options) == 1 else looks[step.options]
            value = step.milliseconds()
            more = "" if step.ratio is None else f"  ({step.ratio['median']:.2f})"
            bar(left, place, step, value, look, height, more)
            if value is not None:
                low, high = step.milliseconds("q1"), step.milliseconds("q3")
                spread = [[value - low], [high - value]]
                left.errorbar(value, place, xerr=spread, color="black", capsize=2, linewidth=0.8)
            bar(right, place, step, step.peak(unit), look, height)
        title(left, of_setting[0])
        scale(left, "time of a step, ms (over the floor)")
        scale(right, f"peak memory of a step, {name}")
    entries = {"median and quartiles": Line2D([], [], color="black", linewidth=0.8)}
    if len(options) > 1:
        entries |= patches(looks.values())
    style.legend(fig, entries, columns=4, bottom=0.28)
    return fig


def peaks(found: list[Step]) -> Figure:
    """Stacked bars, a panel for each length and batch: the parts add up to the measured peak.

    Saved activations go as gradients come. So the larger of the two is drawn, and what there is of
    the other at the peak is among the temporaries.
    """
    settings = list(steps.groups(found, lambda step: step.size).values())
    fig, pairs = in_two_columns(settings, lambda of_setting: 0.165 * len(of_setting))
    for number, (axes, of_setting) in enumerate(pairs):
        methods = method_names(axes, of_setting, shown=number % 2 == 0)
        unit, name = steps.byte_unit(of_setting)
        for step in of_setting:
            place, left = methods.index(step.method), 0.0
            for part, size in parts(step.bytes).items() if step.bytes else ():
                axes.barh(place, size / unit, HEIGHT, left / unit, **style.PARTS[part].bar)
                left += size
            if step.bytes:
                axes.plot(step.bytes["first_step_peak"] / unit, place, **FIRST)
            bar(axes, place, step, step.peak(unit), None)
        title(axes, of_setting[0])
        scale(axes, f"memory at the peak of a step, {name}")
    shown = ("weights", "optimizer", "saved", "gradients", "temporaries")
    first = {"peak of the first step": Line2D([], [], **FIRST)}
    entries = patches(style.PARTS[part] for part in shown) | first
    style.legend(fig, entries, columns=4, bottom=0.28)
    return fig


def parts(sizes: dict) -> dict[str, int]:
    """Bytes alive at the peak, which is their sum, from the left."""
    saved = sizes["saved"] or 0  # unknown under torch.compile
    larger = "saved" if saved >= sizes["gradients"] else "gradients"
    held = {"weights": sizes["weights"], "optimizer": sizes["optimizer"]}
    return {**held, larger: max(saved, sizes["gradients"]), "temporaries": sizes["temporaries"]}


def in_two_columns(
    settings: list[Setting], inches: Callable[[Setting], float]
) -> tuple[Figure, list[tuple[Axes, Setting]]]:
    """A figure with a panel for each setting, whose bars need so many inches; two in a row."""
    columns = min(2, len(settings))
    rows = [settings[start : start + columns] for start in range(0, len(settings), columns)]
    fig, grid = panels([max(map(inches, row)) for row in rows], columns)
    axes = [each for row in grid for each in row]
    for spare in axes[len(settings) :]:
        spare.set_axis_off()
    return fig, list(zip(axes, settings, strict=False))


def panels(rows: list[float], columns: int = 2) -> tuple[Figure, list[list[Axes]]]:
    """A figure whose rows of panels leave so many inches to their bars."""
    heights = [inches + 0.6 for inches in rows]
    sizes = {"figsize": (style.WIDTH, sum(heights) + 0.8), "height_ratios": heights}
    fig, grid = plt.subplots(len(rows), columns, squeeze=False, **sizes)
    return fig, grid.tolist()


def names(axes: Axes, labels: list[str], *, shown: bool = True) -> None:
    """One place for each label, from top to bottom."""
    axes.set_yticks(range(len(labels)), labels if shown else [""] * len(labels), fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def method_names(axes: Axes, found: Iterable[Step], *, shown: bool = True) -> list[str]:
    """Gives each method of the steps a place; returns the methods in that order."""
    present = {step.method for step in found}
    methods = [method for method in style.METHODS if method in present]
    names(axes, [style.METHODS[method].label for method in methods], shown=shown)
    return methods


def bar(
    axes: Axes,
    place: float,
    step: Step,
    value: float | None,
    look: style.Look | None,
    height: float = HEIGHT,
    more: str = "",
) -> None:
    """A bar with its value and `more` beside the axes; the step's mark where there is no value.

    No look, no bar.
    """
    if value is None:
        note(axes, place, step.mark, x=0.02)
        return
    if look is not None:
        axes.barh(place, value, height, **look.bar)
    note(axes, place, digits(value) + more)


def digits(value: float) -> str:
    """Three of them, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def scale(axes: Axes, label: str) -> None:
    """The axis of the values, from 0; to be called when all bars are drawn."""
    axes.set_xlabel(label, fontsize=8)
    axes.set_xlim(left=0)


def title(axes: Axes, step: Step) -> None:
    """Names the panel after the size of its steps. What was cut of the model is in the caption."""
    text = f"{step.shape}, length {step.length:,}, batch {step.batch}"
    axes.set_title(text, loc="left", weight="bold")


def patches(looks: Iterable[style.Look]) -> dict[str, Patch]:
    """Entries of a legend."""
    return {look.label: Patch(**look.bar) for look in looks}


def note(axes: Axes, place: float, text: str, x: float = 1.02) -> None:
    """Writes `text` at the height of `place`, to the right of the axes unless x says otherwise."""
    along = axes.get_yaxis_transform()
    axes.annotate(text, (x, place), xycoords=along, va="center", fontsize=7.5)
