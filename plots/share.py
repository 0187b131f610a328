"""Effect of the share of the parameters that is trained, with and without checkpointing."""

from pathlib import Path

from matplotlib.figure import Figure

from plots import panels, steps, style
from plots.panels import Curve
from plots.steps import Step

TICKS = [0.1, 0.3, 1, 3, 10]  # %
References = dict[tuple, Step]  # of steps.references


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws two figures for each model and batch of the suite "share"."""
    written, others = [], steps.references(document)
    for name, found in steps.series(document, "share"):
        caption = steps.caption(document, found)
        for quantity, fig in (("time", time(found, others)), ("memory", memory(found, others))):
            path = folder / f"share-{quantity}-{name}.svg"
            written.append(style.save(fig, path, caption))
    return written


def trained_percent(step: Step) -> float:
    """Trained parameters as they are; what was asked for where the step did not run."""
    return 100 * (step.share if step.trained is None else step.trained / step.total)


def time(found: list[Step], others: References) -> Figure:
    """Step time over the frozen floor's of the same size and options."""

    def modelled(step: Step) -> float | None:
        floor = _floor(step, others)
        if step.model is None or floor is None or floor.model is None:
            return None
        return step.model["seconds"] / floor.model["seconds"]

    def measured(step: Step) -> float | None:
        return None if step.ratio is None else step.ratio["median"]

    curve = Curve(trained_percent, measured, modelled)
    return _figure(found, curve, {1.0}, "step time / frozen floor")


def memory(found: list[Step], others: References) -> Figure:
    """Peak memory of a step."""
    unit, name = steps.byte_unit(found)
    curve = Curve(trained_percent, lambda s: s.peak(unit), lambda s: s.modelled_peak(unit))
    below = filter(None, (_floor(step, others) for step in found))
    heights = {floor.peak(unit) for floor in below if not floor.mark}
    return _figure(found, curve, heights, f"peak memory, {name}")


def _floor(step: Step, others: References) -> Step | None:
    return others.get((step.size, step.options, "frozen"))


def _figure(found: list[Step], curve: Curve, heights: set[float], y: str) -> Figure:
    fig, by_method = panels.grid(found)
    for method, axes in by_method.items():
        panels.lines(axes, [step for step in found if step.method == method], curve)
        for height in sorted(heights):
            axes.axhline(height, **panels.FLOOR)
    panels.logarithmic(by_method, TICKS)
    panels.finish(fig, by_method, f"trained share of all parameters of {found[0].shape}, %", y)
    return fig
