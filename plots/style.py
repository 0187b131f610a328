"""The look of all figures, and files that change only if a number changes."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; hatches, markers and dashes tell them
# apart in print.
BLUE, ORANGE, GREEN, YELLOW, GREY = "#56B4E9", "#E69F00", "#009E73", "#F0E442", "#BBBBBB"

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": "#E0E0E0",
        "grid.linewidth": 0.6,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.4,
        # Identifiers in the file come from this salt rather than from chance.
        "svg.hashsalt": "s2kernels",
        "svg.fonttype": "path",
    }
)


def save(fig: Figure, path: Path, caption: str) -> Path:
    """Writes an svg without a date, the caption at the bottom left; closes the figure."""
    fig.text(0.01, 0.015, caption, fontsize=6.5, color="#444444")
    fig.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
    plt.close(fig)
    return path


def machine(document: dict) -> str:
    """The machine and the versions of a results file, in a few words."""
    info = document["machine_info"]
    cores = info["cpu"]["count"]
    chip = info["gpu"] or f"{info['cpu']['brand_raw']}, {cores} core{'' if cores == 1 else 's'}"
    versions = [f"{name} {info[name]}" for name in ("torch", "transformers", "peft")]
    if info["gpu"]:
        versions.insert(1, f"triton {info['triton']}")
    return ", ".join([chip, *versions])
