"""Time and peak memory against the tokens of a step, and what the paper printed of its models."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from plots import floors, panels, paper, steps, style
from plots.panels import Curve
from plots.steps import Step

PAPER = {
    "linestyle": "none",
    "marker": "+",
    "markersize": 6,
    "color": "black",
    "zorder": 3,
    "label": paper.MACHINE,
}


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws two figures for each model of the suite "tokens"."""
    written = []
    for name, found in steps.series(document, "tokens", "batch", "length"):
        notes = [paper.NOTE] if any(_printed(found).values()) else []
        drawn = {"time": (time(found), [*notes, floors.NOTE]), "memory": (memory(found), notes)}
        for quantity, (fig, said) in drawn.items():
            path = folder / f"tokens-{quantity}-{name}.svg"
            written.append(style.save(fig, path, steps.caption(document, found, *said)))
    return written


def time(found: list[Step]) -> Figure:
    """Microseconds per token of a step, both axes logarithmic."""

    def per_token(milliseconds: float | None, tokens: int) -> float | None:
        return None if milliseconds is None else milliseconds / tokens * 1e3

    curve = Curve(
        x=lambda step: step.tokens,
        measured=lambda step: per_token(step.milliseconds(), step.tokens),
        modelled=lambda step: per_token(step.modelled_milliseconds(), step.tokens),
    )
    printed = {
        method: [(tokens, seconds / tokens * 1e6) for tokens, seconds, _ in numbers]
        for method, numbers in _printed(found).items()
    }
    return _figure(found, curve, printed, "time per token, µs", logarithmic=True)


def memory(found: list[Step]) -> Figure:
    """Peak memory of a step."""
    unit, name = steps.byte_unit(found)
    curve = Curve(lambda s: s.tokens, lambda s: s.peak(unit), lambda s: s.modelled_peak(unit))
    printed = {
        method: [(tokens, peak / unit) for tokens, _, peak in numbers]
        for method, numbers in _printed(found).items()
    }
    return _figure(found, curve, printed, f"peak memory, {name}", logarithmic=False)


def _printed(found: list[Step]) -> dict[str, list[tuple[int, float, float]]]:
    return {step.method: paper.series(step.shape, step.method) for step in found}


def _figure(found: list[Step], curve: Curve, printed: dict, y: str, logarithmic: bool) -> Figure:
    fig, by_method = panels.grid(found)
    floor = [step for step in found if step.method == "frozen"]
    for method, axes in by_method.items():
        panels.lines(axes, [step for step in found if step.method == method], curve)
        axes.plot(*curve.points(floor), **panels.FLOOR)
        axes.plot(*zip(*printed[method], strict=True) if printed[method] else ([], []), **PAPER)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        panels.from_zero(axes)
    panels.logarithmic(by_method, sorted({step.tokens for step in found}))
    panels.finish(fig, by_method, f"tokens of a step, {found[0].shape}", y)
    return fig
