"""What options such as gradient checkpointing change, in time and in peak memory."""

from pathlib import Path

from matplotlib.figure import Figure

from plots import bars, floors, steps, style
from plots.steps import Step

# Of the options of a figure, in their order.
LOOKS = (
    (style.BLUE, ""),
    (style.ORANGE, "////"),
    (style.GREEN, "...."),
    (style.YELLOW, "xxxx"),
    (style.PINK, "||||"),
    (style.GREY, "\\\\\\\\"),
)


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws a figure for each model of three suites, beside the same steps without options."""
    written, others = [], steps.references(document)
    for suite, shape, found in steps.by_shape(document, "checkpointing", "options", "depth"):
        if all(step.options for step in found):
            plain = {(step.size, "", step.method) for step in found} & others.keys()
            found = [others[key] for key in sorted(plain)] + found
        caption = steps.caption(document, found, floors.NOTE)
        written.append(style.save(figure(found), folder / f"{suite}-{shape}.svg", caption))
    return written


def figure(found: list[Step]) -> Figure:
    """Horizontal bars, one for each option; left the time of a step, right its peak memory."""
    options = sorted({step.options for step in found})
    if len(options) > len(LOOKS):
        raise ValueError(f"a figure can tell {len(LOOKS)} options apart, got {options}")
    looks = {
        option: style.Look(option or "plain", *look)
        for option, look in zip(options, LOOKS, strict=False)
    }
    settings = list(steps.groups(found, lambda step: step.size).values())
    inches = 0.13 * len(options) + 0.08
    fig, rows = bars.panels([inches * len({s.method for s in group}) for group in settings])
    height = 0.84 / len(options)
    for (left, right), of_setting in zip(rows, settings, strict=True):
        methods = bars.method_names(left, of_setting)
        bars.method_names(right, of_setting, shown=False)
        unit, name = steps.byte_unit(of_setting)
        for step in of_setting:
            lane = options.index(step.options)
            place = methods.index(step.method) - 0.42 + (lane + 0.5) * height
            look = {"look": looks[step.options], "height": height}
            bars.bar(left, place, step, step.milliseconds(), step.modelled_milliseconds(), **look)
            bars.bar(right, place, step, step.peak(unit), step.modelled_peak(unit), **look)
        bars.title(left, of_setting[0])
        bars.scale(left, "time of a step, ms")
        bars.scale(right, f"peak memory of a step, {name}")
    entries = bars.patches(looks.values()) | bars.diamond("modelled (roofline)")
    style.legend(fig, entries, columns=3, bottom=0.28)
    return fig
