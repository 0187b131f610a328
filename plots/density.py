"""What more entries of SpIEL take, beside what is predicted: so many bytes each."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from plots import steps, style
from plots.share import trained_percent
from plots.steps import Step

PREDICTED = {"color": "#777777", "linewidth": 1.2, "marker": "D", "markerfacecolor": "white"}


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws a figure for each model and batch of the suite "density" that has peaks of the floor
    and of some density there."""
    written = []
    for name, found in steps.series(document, "density"):
        measured = [step for step in found if not step.mark]
        has_floor = any(step.method == "frozen" for step in measured)
        if has_floor and any(step.share is not None for step in measured):
            path = folder / f"density-{name}.svg"
            written.append(style.save(figure(found), path, steps.caption(document, found)))
    return written


def figure(found: list[Step]) -> Figure:
    """The peak of a step less that of the frozen floor, over the density; both logarithmic."""
    floor = next(step for step in found if step.method == "frozen" and not step.mark)
    unit, name = steps.byte_unit(found)
    fig, axes = plt.subplots(figsize=(style.WIDTH, 3.0))
    for method in dict.fromkeys(step.method for step in found if step.share is not None):
        look = style.METHODS[method]
        of_method = [s for s in found if s.method == method and s.share is not None and not s.mark]
        percents = [trained_percent(step) for step in of_method]
        modelled = [_above(s.modelled_peak(unit), floor.modelled_peak(unit)) for s in of_method]
        if None not in modelled:
            label = f"{look.label}, modelled (O(k) bytes)"
            axes.plot(percents, modelled, **PREDICTED, linestyle=look.dashes, label=label)
        measured = [step.peak(unit) - floor.peak(unit) for step in of_method]
        drawn = {"linestyle": "none", "marker": look.marker, "color": look.color, "zorder": 5}
        axes.plot(percents, measured, **drawn, label=f"{look.label}, measured")
    for step in found:
        if step.method == "full" and not step.mark:
            height = step.peak(unit) - floor.peak(unit)
            axes.axhline(height, color="black", linewidth=1, linestyle=":", label="full, measured")
    axes.set(xscale="log", yscale="log")
    ticks = sorted({100 * step.share for step in found if step.share is not None})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"trained entries, % of all parameters of {floor.model_name}")
    axes.set_ylabel(f"peak above the frozen floor, {name}")
    handles, labels = axes.get_legend_handles_labels()
    style.legend(fig, dict(zip(labels, handles, strict=True)), columns=4, bottom=0.2)
    return fig


def _above(peak: float | None, floor: float | None) -> float | None:
    return None if peak is None or floor is None else peak - floor
