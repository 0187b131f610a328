"""What more entries of SpIEL take in memory."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from plots import steps, style
from plots.steps import Step


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws a figure for each model and batch that has the floor's peak and that of a density."""
    written = []
    for name, found in steps.series(document, "density"):
        measured = [step for step in found if not step.mark]
        has_floor = any(step.method == "frozen" for step in measured)
        if has_floor and any(step.share is not None for step in measured):
            path = folder / f"density-{name}.svg"
            caption = steps.caption(document, found)
            written.append(style.save(figure(measured), path, caption))
    return written


def figure(measured: list[Step]) -> Figure:
    """The peak of a step less that of the frozen floor, over the density; both logarithmic."""
    floor = next(step for step in measured if step.method == "frozen")
    unit, name = steps.byte_unit(measured)
    fig, axes = plt.subplots(figsize=(style.WIDTH, 3.0))
    for method in dict.fromkeys(step.method for step in measured if step.share is not None):
        look = style.METHODS[method]
        of_method = [s for s in measured if s.method == method and s.share is not None]
        label = look.label
        if len(of_method) > 1:
            label += f": {bytes_an_entry(of_method):.0f} bytes an entry, from the largest two"
        drawn = {"linestyle": look.dashes, "marker": look.marker, "color": look.color, "zorder": 5}
        above = [step.peak(unit) - floor.peak(unit) for step in of_method]
        axes.plot([s.trained_percent for s in of_method], above, **drawn, label=label)
    for step in measured:
        if step.method == "full":
            height = step.peak(unit) - floor.peak(unit)
            axes.axhline(height, color="black", linewidth=1, linestyle=":", label="full")
    axes.set(xscale="log", yscale="log")
    ticks = sorted({100 * step.share for step in measured if step.share is not None})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"trained entries, % of all parameters of {floor.model_name}")
    axes.set_ylabel(f"peak above the frozen floor, {name}")
    handles, labels = axes.get_legend_handles_labels()
    style.legend(fig, dict(zip(labels, handles, strict=True)), columns=4, bottom=0.2)
    return fig


def bytes_an_entry(of_method: list[Step]) -> float:
    """How much the peak grows from the second largest density to the largest."""
    fewer, more = sorted(of_method, key=lambda step: step.trained)[-2:]
    return (more.bytes["peak"] - fewer.bytes["peak"]) / (more.trained - fewer.trained)
