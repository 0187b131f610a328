"""Step time and peak memory of every method, a row of panels for each sequence length and batch.

The arrangement follows Figure 5 of the S2FT paper.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plots import bars, floors, steps, style
from plots.steps import Step


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws a figure for each model of the suite "figure5"."""
    written = []
    for suite, shape, found in steps.by_shape(document, "figure5"):
        caption = steps.caption(document, found, floors.NOTE)
        written.append(style.save(figure(found), folder / f"{suite}-{shape}.svg", caption))
    return written


def figure(found: list[Step]) -> Figure:
    """Horizontal bars: left the time of a step, right its peak memory; open diamonds: the model."""
    settings = steps.groups(found, lambda step: step.setting)
    fig, rows = bars.panels([0.165 * len(of_setting) for of_setting in settings.values()])
    for (left, right), of_setting in zip(rows, settings.values(), strict=True):
        _time(left, of_setting)
        _memory(right, of_setting)
    entries = {
        **bars.patches([style.Look("measured, median", style.GREY)]),
        "quartiles": Line2D([], [], color="black", linewidth=0.8),
        **bars.diamond("modelled (roofline)"),
    }
    style.legend(fig, entries, columns=3, bottom=0.28)
    return fig


def _time(axes: Axes, of_setting: list[Step]) -> None:
    methods = bars.method_names(axes, of_setting)
    for step in of_setting:
        place, value = methods.index(step.method), step.milliseconds()
        bars.bar(
            *(axes, place, step, value, step.modelled_milliseconds()),
            look=style.METHODS[step.method],
            more="" if step.ratio is None else f"  ({step.ratio['median']:.2f})",
        )
        if value is not None:
            spread = [[value - step.seconds["q1"] * 1e3], [step.seconds["q3"] * 1e3 - value]]
            axes.errorbar(value, place, xerr=spread, color="black", capsize=2, linewidth=0.8)
    bars.title(axes, of_setting[0])
    bars.scale(axes, "time of a step, ms (over the floor)")


def _memory(axes: Axes, of_setting: list[Step]) -> None:
    methods = bars.method_names(axes, of_setting, shown=False)
    unit, name = steps.byte_unit(of_setting)
    for step in of_setting:
        bars.bar(
            *(axes, methods.index(step.method), step),
            *(step.peak(unit), step.modelled_peak(unit)),
            look=style.METHODS[step.method],
        )
    bars.scale(axes, f"peak memory of a step, {name}")
