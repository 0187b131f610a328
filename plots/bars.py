"""Horizontal bars, one a method, with what was modelled as an open diamond on the bar."""

from collections.abc import Iterable

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from plots import style
from plots.steps import Step

HEIGHT = 0.72  # of a bar, where the next is 1 below


def panels(rows: list[float], columns: int = 2) -> tuple[Figure, list[list[Axes]]]:
    """A figure whose rows of panels leave so many inches to their bars."""
    heights = [inches + 0.6 for inches in rows]
    size = (style.WIDTH, sum(heights) + 0.8)
    fig, grid = plt.subplots(
        *(len(rows), columns), figsize=size, squeeze=False, height_ratios=heights
    )
    return fig, grid.tolist()


def names(axes: Axes, labels: list[str], *, shown: bool = True) -> None:
    """One place for each label, from top to bottom."""
    axes.set_yticks(range(len(labels)), labels if shown else [""] * len(labels), fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def method_names(axes: Axes, steps: Iterable[Step], *, shown: bool = True) -> list[str]:
    """Gives each method of the steps a place; returns the methods in that order."""
    found = {step.method for step in steps}
    methods = [method for method in style.METHODS if method in found]
    names(axes, [style.METHODS[method].label for method in methods], shown=shown)
    return methods


def bar(
    axes: Axes,
    place: float,
    step: Step,
    value: float | None,
    modelled: float | None,
    *,
    look: style.Look | None,
    height: float = HEIGHT,
    more: str = "",
) -> None:
    """A bar with its value and `more` beside the axes, and an open diamond at what is modelled.

    Where there is no value, the step's mark and what is modelled are written in the bar's place: a
    model that does not fit into memory would set the scale for all that do. No look, no bar.
    """
    if value is None:
        instead = "" if modelled is None else f"  (modelled: {digits(modelled)})"
        _write(axes, 0.02, place, step.mark + instead)
        return
    if look is not None:
        axes.barh(place, value, height, **look.bar)
    note(axes, place, digits(value) + more)
    if modelled is not None:
        axes.plot(modelled, place, **style.MODELLED)


def digits(value: float) -> str:
    """Three of them, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def scale(axes: Axes, label: str) -> None:
    """The axis of the values, from 0; to be called when all bars are drawn."""
    axes.set_xlabel(label, fontsize=8)
    axes.set_xlim(left=0)


def title(axes: Axes, step: Step) -> None:
    """Names the panel after the setting of its steps."""
    text = f"{step.model_name}, length {step.length:,}, batch {step.batch}"
    axes.set_title(text, loc="left", weight="bold")


def patches(looks: Iterable[style.Look]) -> dict[str, Patch]:
    """Entries of a legend."""
    return {look.label: Patch(**look.bar) for look in looks}


def diamond(label: str) -> dict[str, Line2D]:
    """The entry of the modelled numbers in a legend."""
    return {label: Line2D([], [], **style.MODELLED)}


def note(axes: Axes, place: float, text: str) -> None:
    """Writes `text` to the right of the axes, at the height of `place`."""
    _write(axes, 1.02, place, text)


def _write(axes: Axes, x: float, place: float, text: str) -> None:
    along = axes.get_yaxis_transform()
    axes.annotate(text, (x, place), xycoords=along, va="center", fontsize=7.5)
