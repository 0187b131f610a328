"""A panel for each method, with shared axes: what was measured, the floor, and what is modelled."""

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from plots import steps, style
from plots.steps import Step

COLUMNS = 4
FLOOR = {"color": "#777777", "linestyle": ":", "linewidth": 1.2, "label": "frozen floor, measured"}
# Open, so that a point which it meets is seen.
MODELLED = style.MODELLED | {
    "markerfacecolor": "none",
    "markersize": 6,
    "label": "modelled (roofline)",
}
# How the lines of a panel that differ in options are told apart.
VARIANTS = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "v"))


@dataclass(frozen=True)
class Curve:
    """What is drawn of a step: an abscissa and two ordinates, None where there is none."""

    x: Callable[[Step], float]
    measured: Callable[[Step], float | None]
    modelled: Callable[[Step], float | None]

    def points(self, found: list[Step]) -> tuple[list[float], list[float]]:
        """Abscissae and ordinates of the steps that were measured."""
        return self._points(found, self.measured)

    def modelled_points(self, found: list[Step]) -> tuple[list[float], list[float]]:
        """Those beside measured ones: what did not fit would set the scale for what did."""
        return self._points([s for s in found if self.measured(s) is not None], self.modelled)

    def _points(self, found: list[Step], y: Callable) -> tuple[list[float], list[float]]:
        known = [step for step in found if y(step) is not None]
        return [self.x(step) for step in known], [y(step) for step in known]


def grid(found: list[Step]) -> tuple[Figure, dict[str, Axes]]:
    """The figure, and the axes of each method but the floor."""
    present = {step.method for step in found} - {"frozen"}
    methods = [method for method in style.METHODS if method in present]
    lines = -(-len(methods) // COLUMNS)
    columns = -(-len(methods) // lines)
    fig, axes = plt.subplots(
        *(lines, columns),
        figsize=(style.WIDTH, 1.3 * lines + 1.5),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    panels = list(axes.flat)
    for spare in panels[len(methods) :]:
        spare.set_axis_off()
    for above in panels[len(methods) - columns : len(methods)]:
        above.tick_params(labelbottom=True)
    for panel, method in zip(panels, methods, strict=False):
        panel.set_title(style.METHODS[method].label, pad=3)
    return fig, dict(zip(methods, panels, strict=False))


def lines(axes: Axes, of_method: list[Step], curve: Curve) -> None:
    """Draws one method: a line for each variant of options, the model's diamonds, OOM marks."""
    look = style.METHODS[of_method[0].method]
    variants = steps.groups(of_method, lambda step: step.options)
    looks = VARIANTS[: len(variants)]  # strict: more of them could not be told apart
    for (options, variant), (dashes, marker) in zip(variants.items(), looks, strict=True):
        axes.plot(
            *curve.points(variant),
            color="black",
            linewidth=1,
            linestyle=dashes,
            marker=marker,
            markersize=4.5,
            markerfacecolor=look.color,
            label=", ".join(filter(None, ["measured", options])),
        )
    axes.plot(*curve.modelled_points(of_method), **MODELLED)
    for step in of_method:
        if curve.measured(step) is None:
            axes.annotate(
                *(step.mark, (curve.x(step), 0.97)),
                xycoords=axes.get_xaxis_transform(),
                rotation=90,
                ha="center",
                va="top",
                fontsize=7,
            )


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


def from_zero(axes: Axes) -> None:
    """Starts y, which all panels share, at 0; to be called when all is drawn."""
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)


def finish(fig: Figure, panels: dict[str, Axes], x: str, y: str) -> None:
    """Labels the figure's axes, and adds the legend."""
    fig.supxlabel(x, fontsize=9, y=0.4 / fig.get_figheight())
    fig.supylabel(y, fontsize=9)
    entries: dict[str, object] = {}
    for axes in panels.values():
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if len(handle.get_xdata()):
                entries.setdefault(label, handle)
    order = sorted(entries, key=lambda label: not label.startswith("measured"))
    style.legend(fig, {label: entries[label] for label in order}, columns=4, bottom=0.2)
