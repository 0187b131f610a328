"""What the peak of a step's memory is made of, for every method, length and batch.

Saved activations go as gradients come, so the larger of the two is drawn, and what there is of the
other at the peak is among the temporaries: the parts add up to the measured peak.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plots import bars, steps, style
from plots.steps import Step

FIRST = {"linestyle": "none", "marker": "|", "markersize": 10, "color": "black"}
COLUMNS = 2
NOTE = "Of saved activations and gradients the larger is drawn."


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws a figure for each model of the suite "figure5"."""
    written = []
    for _, shape, found in steps.by_shape(document, "figure5"):
        caption = steps.caption(document, found, NOTE)
        written.append(style.save(figure(found), folder / f"peak-{shape}.svg", caption))
    return written


def figure(found: list[Step]) -> Figure:
    """Stacked horizontal bars, a panel for each setting; open diamonds: the modelled peak."""
    settings = list(steps.groups(found, lambda step: step.setting).values())
    columns = min(COLUMNS, len(settings))
    rows = [settings[start : start + columns] for start in range(0, len(settings), columns)]
    fig, grid = bars.panels([0.165 * max(map(len, row)) for row in rows], columns)
    for row, panels in zip(rows, grid, strict=True):
        for axes, of_setting in zip(panels, row, strict=False):
            _stack(axes, of_setting, shown=axes is panels[0])
        for spare in panels[len(row) :]:
            spare.set_axis_off()
    shown = [style.PARTS[part] for part in ("weights", "optimizer", "saved", "gradients")]
    entries = {
        **bars.patches([*shown, style.PARTS["temporaries"]]),
        "peak of the first step": Line2D([], [], **FIRST),
        **bars.diamond("modelled peak"),
    }
    style.legend(fig, entries, columns=4, bottom=0.28)
    return fig


def parts(sizes: dict) -> dict[str, int]:
    """Bytes alive at the peak, which is their sum, from the left."""
    saved = sizes["saved"] or 0  # unknown under torch.compile
    larger = "saved" if saved >= sizes["gradients"] else "gradients"
    held = {"weights": sizes["weights"], "optimizer": sizes["optimizer"]}
    return {**held, larger: max(saved, sizes["gradients"]), "temporaries": sizes["temporaries"]}


def _stack(axes: Axes, of_setting: list[Step], *, shown: bool) -> None:
    methods = bars.method_names(axes, of_setting, shown=shown)
    unit, name = steps.byte_unit(of_setting)
    for step in of_setting:
        place, left = methods.index(step.method), 0.0
        if step.bytes is not None:
            for part, size in parts(step.bytes).items():
                look = style.PARTS[part].bar
                axes.barh(place, size / unit, bars.HEIGHT, left / unit, **look)
                left += size
            axes.plot(step.bytes["first_step_peak"] / unit, place, **FIRST)
        bars.bar(axes, place, step, step.peak(unit), step.modelled_peak(unit), look=None)
    bars.title(axes, of_setting[0])
    bars.scale(axes, f"memory at the peak of a step, {name}")
