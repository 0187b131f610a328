"""The look of all figures. A file changes only if a number changes."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito's colours, for colour-blind readers; hatches, markers and dashes, for print.
BLUE, ORANGE, GREEN, YELLOW, GREY = "#56B4E9", "#E69F00", "#009E73", "#F0E442", "#BBBBBB"
RED, PINK, NAVY, WHITE = "#D55E00", "#CC79A7", "#0072B2", "#FFFFFF"

WIDTH = 7.6  # inches, of every figure of the laboratory

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


@dataclass(frozen=True)
class Look:
    """How something is drawn: its label, and what tells it apart as a bar and as a line."""

    label: str
    color: str
    hatch: str = ""
    marker: str = "o"
    dashes: object = "-"

    @property
    def bar(self) -> dict:
        """Arguments of Axes.barh, and of a Patch."""
        return dict(facecolor=self.color, hatch=self.hatch, edgecolor="black", linewidth=0.7)


# Every method of the results, in the order of tables and figures.
METHODS = {
    "frozen": Look("frozen floor", WHITE, "", ".", ":"),
    "full": Look("full", GREY, "//", "s"),
    "lora": Look("lora", ORANGE, "\\\\", "^"),
    "lora_fp32": Look("lora fp32", ORANGE, "\\\\\\\\\\", "v", "-."),
    "lora_fused": Look("lora fused", ORANGE, "", "<", (0, (1, 1))),
    "dora": Look("dora", RED, "xx", "D"),
    "galore": Look("galore", PINK, "||", "p"),
    "lisa": Look("lisa", PINK, "--", "h", "-."),
    "loreft": Look("loreft", YELLOW, "oo", "*"),
    "shira": Look("shira", YELLOW, "++", "P", "-."),
    "spiel": Look("spiel", NAVY, "//", "X", "-."),
    "spiel_ma": Look("spiel ma", NAVY, "..", "d", (0, (1, 1))),
    "s2ft_inplace": Look("s2ft inplace", BLUE, "", "o"),
    "s2ft_additive": Look("s2ft additive", GREEN, "..", "x", (0, (4, 3))),
    "s2ft_permuted_inplace": Look("s2ft permuted inplace", BLUE, "//", "1", "--"),
    "s2ft_permuted_additive": Look("s2ft permuted additive", GREEN, "xx", "2", (0, (1, 1))),
    "s2ft_unfused": Look("s2ft unfused", BLUE, "\\\\", "P", "-."),
}

# Parts of a step's memory.
PARTS = {
    "weights": Look("weights", WHITE),
    "saved": Look("saved activations", BLUE),
    "gradients": Look("gradients", ORANGE, "////"),
    "optimizer": Look("optimizer state", GREY, "xxxx"),
    "temporaries": Look("temporaries", YELLOW, "...."),
}


def legend(fig: Figure, entries: dict[str, object], *, columns: int, bottom: float) -> None:
    """A legend at the top left, by label; fits the axes between it and `bottom` inches."""
    place = {"loc": "upper left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.3}
    fig.legend(list(entries.values()), list(entries), ncols=columns, **place)
    height, lines = fig.get_figheight(), -(-len(entries) // columns)
    fig.tight_layout(rect=(0, bottom / height, 1, 1 - (0.1 + 0.17 * lines) / height))


def ratio_bars(
    ratios: dict[str, dict], looks: dict[str, Look], notes: list[str], label: str
) -> Figure:
    """A bar for each ratio to the frozen floor: median and quartiles, and a note beside them."""
    fig, axes = plt.subplots(figsize=(6.8, 0.9 + 0.27 * len(ratios)))
    right = max(ratio["q3"] for ratio in ratios.values())
    for place, (name, ratio) in enumerate(ratios.items()):
        median, look = ratio["median"], looks[name]
        spread = [[median - ratio["q1"]], [ratio["q3"] - median]]
        axes.barh(place, median, 0.68, **look.bar)
        if look is not METHODS["frozen"]:
            axes.errorbar(median, place, xerr=spread, color="black", capsize=2.5, linewidth=0.9)
        text = f"{median:.3f}  {notes[place]}"
        axes.text(right * 1.02, place, text, va="center", fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.9, linestyle=":")
    labels = [looks[name].label for name in ratios]
    axes.set(yticks=range(len(ratios)), yticklabels=labels, xlim=(0, right * 1.26))
    axes.set_xlabel(label)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    return fig


def save(fig: Figure, path: Path, caption: str) -> Path:
    """Writes an svg without a date, the caption at the bottom left; closes the figure."""
    fig.text(0.01, 0.04 / fig.get_figheight(), caption, fontsize=6.5, color="#444444")
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
