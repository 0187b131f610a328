"""The pictures that commands write beside their results; without matplotlib, a note instead."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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
    values: Mapping[str, Tensor],
    units: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    title: str,
    path: Path,
) -> None:
    """A lane for each structure: scores to the right, positions upwards, selected ones marked.

    values, units, kinds: by structure, its scores, what is selected of them, and what it is.
    """
    panels: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        panels.setdefault(kind, []).append(name)
    figure = _figure(path, (5.5 * len(panels), 1.2 + 0.25 * max(map(len, panels.values()))))
    if figure is None:
        return
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (kind, names) in zip(every, panels.items(), strict=True):
        for lane, name in enumerate(names):
            score = values[name]
            chosen: Any = units[name].long() if name in units else []
            place = lane + 0.35 - 0.7 * (torch.arange(len(score)) + 0.5) / len(score)
            many = len(score) * len(names) > 5000
            axes.plot(score, place, ".", color="#BBBBBB", ms=2, rasterized=many)
            axes.plot(score[chosen], place[chosen], "o", color="#D55E00", ms=3, rasterized=many)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set(title=f"{kind}: {title}", xlabel="score", ylim=(len(names) - 0.5, -0.5))
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
