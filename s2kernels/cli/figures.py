"""The pictures that commands write beside their results; without matplotlib, a note instead."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw_losses(curves: Mapping[str, list[tuple[int, float | None]]], path: Path) -> None:
    """The curves `loss` and `held_out_loss`, of (step, nats per token), as the SVG file `path`."""
    figure = _figure(path, (6, 3.5))
    if figure is None:
        return
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
    for name, title, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o--")):
        steps, values = zip(*curves[name], strict=True) if curves[name] else ([], [])
        axes.plot(steps, [math.nan if y is None else y for y in values], style, label=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def draw_scores(
    values: Mapping[str, Any],
    units: Mapping[str, Any],
    kinds: Mapping[str, str],
    title: str,
    path: Path,
) -> None:
    """A lane for each structure: scores to the right, positions upwards, selected ones marked.

    values, units, kinds: by structure, its scores, what is selected of them, and what it is.
    """
    panels = list(dict.fromkeys(kinds.values()))
    names = {panel: [name for name in values if kinds[name] == panel] for panel in panels}
    height = 1.2 + 0.25 * max(map(len, names.values()))
    figure = _figure(path, (5.5 * len(panels), height))
    if figure is None:
        return
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for lane, name in enumerate(names[panel]):
            score = values[name].numpy()
            chosen = units[name].long().numpy() if name in units else []
            place = [lane + 0.35 - 0.7 * (i + 0.5) / len(score) for i in range(len(score))]
            picked = [place[unit] for unit in chosen]
            raster = sum(len(values[name]) for name in names[panel]) > 5000
            axes.plot(score, place, ".", color="#BBBBBB", ms=2, rasterized=raster)
            axes.plot(score[chosen], picked, "o", color="#D55E00", ms=3, rasterized=raster)
        axes.set_yticks(range(len(names[panel])), names[panel], fontsize=7)
        axes.set(title=f"{panel}: {title}", xlabel="score", ylim=(len(names[panel]) - 0.5, -0.5))
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _figure(path: Path, size: tuple[float, float]) -> Any | None:
    """An empty figure; None, with a note, where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"note: no {path.name}, which needs matplotlib: pip install matplotlib")
        return None
    return Figure(figsize=size, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    """The same figure gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "s2kernels"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
