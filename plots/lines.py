"""A panel for each method, with shared axes: over tokens, over the trained share, over layers."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from plots import paper, steps, style
from plots.steps import Step

Quantity = Callable[[Step], float | None]
COLUMNS = 4
FLOOR = {"color": "#777777", "linestyle": ":", "linewidth": 1.2, "label": "frozen floor"}
PAPER = {"linestyle": "none", "marker": "+", "markersize": 6, "color": "black", "zorder": 3}
CUTS = {"color": "black", "linestyle": (0, (1, 2)), "linewidth": 0.9}
END = dict(linestyle="none", marker="s", markersize=7, label="extrapolated from two cuts")
END |= {"markerfacecolor": "none", "markeredgecolor": "black"}


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws two figures, time and memory, for each model of three suites."""
    written = []
    for suite, along, figures in (
        ("tokens", ("batch", "length"), over_tokens),
        ("share", (), over_share),
        ("extrapolation", ("layers",), over_layers),
    ):
        for name, found in steps.series(document, suite, *along):
            if all(step.method == "frozen" for step in found):
                continue  # an interrupted run has the floor alone
            for quantity, (fig, notes) in figures(found).items():
                path = folder / f"{suite}-{quantity}-{name}.svg"
                written.append(style.save(fig, path, steps.caption(document, found, *notes)))
    return written


def over_tokens(found: list[Step]) -> dict[str, tuple[Figure, list[str]]]:
    """Time per token and peak memory over the tokens of a step, with what the paper printed."""
    unit, name = steps.byte_unit(found)
    printed = {step.method: paper.series(step.shape, step.method) for step in found}
    notes = [paper.NOTE] if any(printed.values()) else []

    def per_token(step: Step) -> float | None:
        value = step.milliseconds()
        return None if value is None else value / step.tokens * 1e3

    drawn = {}
    for quantity, y, label, of_paper in (
        ("time", per_token, "time per token, µs", lambda n, seconds, peak: seconds / n * 1e6),
        ("memory", lambda s: s.peak(unit), f"peak memory, {name}", lambda n, _, peak: peak / unit),
    ):
        fig, panels = grid(found, lambda step: step.tokens, y)
        for method, axes in panels.items():
            points = [(numbers[0], of_paper(*numbers)) for numbers in printed[method]]
            if points:
                axes.plot(*zip(*points, strict=True), **PAPER, label=paper.MACHINE)
        if quantity == "time":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
        logarithmic(panels, sorted({step.tokens for step in found}))
        finish(fig, panels, f"tokens of a step, {found[0].shape}", label)
        drawn[quantity] = (fig, [*notes, steps.NOTE] if quantity == "time" else notes)
    return drawn


def over_share(found: list[Step]) -> dict[str, tuple[Figure, list[str]]]:
    """Step time over the floor's and peak memory, over the share of parameters that is trained."""
    unit, name = steps.byte_unit(found)
    shares = [step for step in found if step.share is not None]
    floors = [step for step in found if step.method == "frozen" and not step.mark][:1]
    heights = {"time": [1.0], "memory": [step.peak(unit) for step in floors]}
    drawn = {}
    for quantity, y, label in (
        ("time", lambda s: None if s.ratio is None else s.ratio["median"], "step / frozen floor"),
        ("memory", lambda s: s.peak(unit), f"peak memory, {name}"),
    ):
        fig, panels = grid(shares, lambda step: step.trained_percent, y)
        for axes in panels.values():
            for height in heights[quantity]:
                axes.axhline(height, **FLOOR)
        logarithmic(panels, [0.1, 0.3, 1, 3, 10])
        finish(fig, panels, f"trained share of all parameters of {found[0].shape}, %", label)
        drawn[quantity] = (fig, [])
    return drawn


def over_layers(found: list[Step]) -> dict[str, tuple[Figure, list[str]]]:
    """From cuts of a few layers to the whole model: measured, and the line through two cuts."""
    if len({step.layers for step in found}) == 1:
        return {}
    unit, name = steps.byte_unit(found)
    drawn = {}
    for quantity, y, label, notes in (
        ("time", Step.milliseconds, "time of a step, ms", [steps.NOTE]),
        ("memory", lambda step: step.peak(unit), f"peak memory, {name}", []),
    ):
        fig, panels = grid(found, lambda step: step.layers, y)
        for method, axes in panels.items():
            of_method = [step for step in found if step.method == method]
            depth = of_method[0].of_layers
            cuts = [(s.layers, y(s)) for s in of_method if s.layers < depth and not s.mark][:2]
            if len(cuts) == 2:
                (x0, y0), (x1, y1) = cuts
                end = y0 + (y1 - y0) / (x1 - x0) * (depth - x0)
                axes.plot([x0, depth], [y0, end], **CUTS)
                axes.plot(depth, end, **END)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        finish(fig, panels, f"layers of {found[0].shape} that are run", label)
        drawn[quantity] = (fig, notes)
    return drawn


def grid(found: list[Step], x: Quantity, y: Quantity) -> tuple[Figure, dict[str, Axes]]:
    """The figure, and the axes of each method but the floor: its line, the floor's, its marks."""
    present = {step.method for step in found} - {"frozen"}
    methods = [method for method in style.METHODS if method in present]
    lines = -(-len(methods) // COLUMNS)
    columns = -(-len(methods) // lines)
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    fig, axes = plt.subplots(lines, columns, figsize=(style.WIDTH, 1.3 * lines + 1.5), **shared)
    panels = list(axes.flat)
    for spare in panels[len(methods) :]:
        spare.set_axis_off()
    for above in panels[len(methods) - columns : len(methods)]:
        above.tick_params(labelbottom=True)
    for panel, method in zip(panels, methods, strict=False):
        look = style.METHODS[method]
        panel.set_title(look.label, pad=3)
        of_method = [step for step in found if step.method == method]
        marker = {"marker": "o", "markersize": 4.5, "markerfacecolor": look.color}
        panel.plot(
            *_points(of_method, x, y), color="black", linewidth=1, label="measured", **marker
        )
        floor = [step for step in found if step.method == "frozen"]
        panel.plot(*_points(floor, x, y), **FLOOR)
        for step in of_method:
            if step.mark:
                place, along = (x(step), 0.97), panel.get_xaxis_transform()
                look = dict(rotation=90, ha="center", va="top", fontsize=7)
                panel.annotate(step.mark, place, xycoords=along, **look)
    return fig, dict(zip(methods, panels, strict=False))


def _points(found: list[Step], x: Quantity, y: Quantity) -> tuple[list, list]:
    known = [step for step in found if y(step) is not None]
    return [x(step) for step in known], [y(step) for step in known]


def logarithmic(panels: dict[str, Axes], ticks: list[float]) -> None:
    """A logarithmic x, with those of the `ticks` that have room."""
    first = next(iter(panels.values()))
    kept = ticks[:1]
    for tick in ticks[1:]:
        if tick / kept[-1] > 2.5:
            kept.append(tick)
    first.set_xscale("log")
    first.set_xticks(kept, [f"{tick:g}" for tick in kept])
    first.xaxis.set_minor_locator(NullLocator())


def finish(fig: Figure, panels: dict[str, Axes], x: str, y: str) -> None:
    """Labels the figure's axes, and adds the legend."""
    fig.supxlabel(x, fontsize=9, y=0.4 / fig.get_figheight())
    fig.supylabel(y, fontsize=9)
    entries: dict[str, object] = {}
    for axes in panels.values():
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if len(handle.get_xdata()):
                entries.setdefault(label, handle)
    style.legend(fig, entries, columns=4, bottom=0.2)
