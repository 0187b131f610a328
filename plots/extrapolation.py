"""From a few layers to all of them: the line through two cuts of a model, drawn to its depth."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plots import floors, panels, steps, style
from plots.panels import Curve
from plots.steps import Step

LINE = {"color": "black", "linestyle": (0, (1, 2)), "linewidth": 0.9}
END = {
    "linestyle": "none",
    "marker": "s",
    "markersize": 7,
    "markerfacecolor": "none",
    "markeredgecolor": "black",
    "label": "extrapolated from two cuts",
}


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws two figures for each model and batch of the suite "extrapolation" that has more than
    one depth."""
    written = []
    for name, found in steps.series(document, "extrapolation", "layers"):
        if len({step.layers for step in found}) == 1:
            continue
        drawn = {"time": (time(found), [floors.NOTE]), "memory": (memory(found), [])}
        for quantity, (fig, notes) in drawn.items():
            path = folder / f"extrapolation-{quantity}-{name}.svg"
            written.append(style.save(fig, path, steps.caption(document, found, *notes)))
    return written


def time(found: list[Step]) -> Figure:
    """Milliseconds of a step, against the layers of the cut."""
    curve = Curve(lambda s: s.layers, Step.milliseconds, Step.modelled_milliseconds)
    return _figure(found, curve, "time of a step, ms")


def memory(found: list[Step]) -> Figure:
    """Peak memory of a step, against the layers of the cut."""
    unit, name = steps.byte_unit(found)
    curve = Curve(lambda s: s.layers, lambda s: s.peak(unit), lambda s: s.modelled_peak(unit))
    return _figure(found, curve, f"peak memory, {name}")


def extrapolate(points: list[tuple[float, float]], to: float) -> float:
    """The straight line through two points, at `to`."""
    (x0, y0), (x1, y1) = points
    return y0 + (y1 - y0) / (x1 - x0) * (to - x0)


def _figure(found: list[Step], curve: Curve, y: str) -> Figure:
    fig, by_method = panels.grid(found)
    floor = [step for step in found if step.method == "frozen"]
    for method, axes in by_method.items():
        of_method = [step for step in found if step.method == method]
        panels.lines(axes, of_method, curve)
        axes.plot(*curve.points(floor), **panels.FLOOR)
        _extend(axes, of_method, curve)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels.from_zero(axes)
    panels.finish(fig, by_method, f"layers of {found[0].shape} that are run", y)
    return fig


def _extend(axes: Axes, of_method: list[Step], curve: Curve) -> None:
    """Draws the line through the first two cuts, if there are two, to the model's depth."""
    depth = of_method[0].of_layers
    cuts = list(zip(*curve.points([s for s in of_method if s.layers < depth]), strict=True))[:2]
    if len(cuts) == 2:
        end = extrapolate(cuts, depth)
        axes.plot([cuts[0][0], depth], [cuts[0][1], end], **LINE)
        axes.plot(depth, end, **END)
