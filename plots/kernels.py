"""How near each op comes to what the machine can do at all: results/<device>/ops.json."""

from pathlib import Path

from matplotlib.figure import Figure

from plots import bars, style
from plots.steps import groups

IMPLEMENTATIONS = {
    "torch": style.Look("torch", style.GREY, "//"),
    "triton": style.Look("triton", style.BLUE),
}


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws the figure where the file says what the machine's ceilings are."""
    if "ceilings" not in document["machine_info"]:
        return []
    caption = (
        "Ceiling: the op's bytes at the speed of a copy, or its FLOPs at that of a GEMM, whichever "
        "takes longer; both measured.\n"
        "More than 100 %: operands in a cache, or a product faster than the measured one. "
        "On a GPU a graph of many launches is timed.\n"
        "On a CPU, and where an op waits for the device, Python calls it: of a short op, the "
        f"host's time. {style.machine(document)}."
    )
    return [style.save(figure(document), folder / "kernels.svg", caption)]


def figure(document: dict) -> Figure:
    """Horizontal bars: % of the ceiling, of each op and implementation; a panel for each shape."""
    shapes = groups(document["benchmarks"], lambda entry: entry["group"].partition(" ")[2])
    drawn = {entry["params"]["impl"] for entry in document["benchmarks"]}
    each = 0.1 + 0.12 * len(drawn)
    fig, pairs = bars.in_two_columns(list(shapes), lambda name: each * len(_ops(shapes[name])))
    for axes, name in pairs:
        entries, ops = shapes[name], _ops(shapes[name])
        bars.names(axes, ops)
        impls = sorted({entry["params"]["impl"] for entry in entries})
        height = 0.76 / len(impls)
        for entry in entries:
            share, bound = achieved(entry, document["machine_info"]["ceilings"])
            impl = entry["params"]["impl"]
            lane = ops.index(entry["group"].partition(" ")[0]) - 0.38
            place = lane + (impls.index(impl) + 0.5) * height
            axes.barh(place, share * 100, height, **IMPLEMENTATIONS[impl].bar)
            bars.note(axes, place, f"{share:.0%} {bound}")
        axes.axvline(100, color="black", linewidth=0.9, linestyle=":")
        bars.scale(axes, "achieved share of the ceiling, %")
        axes.set_title(name, loc="left", weight="bold")
    looks = [look for name, look in IMPLEMENTATIONS.items() if name in drawn]
    style.legend(fig, bars.patches(looks), columns=2, bottom=0.28)
    return fig


def achieved(entry: dict, ceilings: dict) -> tuple[float, str]:
    """Least time that the op can take over its median, and what bounds it: "copy" or "GEMM"."""
    extra = entry["extra_info"]
    copy = extra["bytes"] / ceilings["copy_bytes_per_second"]
    gemm = extra["flops"] / ceilings["gemm_flops"][extra["dtype"].removeprefix("torch.")]
    return max(copy, gemm) / entry["stats"]["median"], "copy" if copy >= gemm else "GEMM"


def _ops(entries: list[dict]) -> list[str]:
    return list(dict.fromkeys(entry["group"].partition(" ")[0] for entry in entries))
