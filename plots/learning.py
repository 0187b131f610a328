"""Figures of bench/learning: learning against forgetting, channels, the share, the theory."""

import json
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from plots import style
from plots.learning_tables import STRATEGIES, measure, shares
from plots.studies import DOWN, ENTRANTS, Found, chosen, interval, of, read, values

LOOKS = {
    **{name: style.METHODS[name] for name in ("frozen", "full", "lora", "dora", "shira", "spiel")},
    "s2ft o + down": style.Look("s2ft o + down", style.BLUE),
    "s2ft down": style.Look("s2ft down", style.GREEN, "..", "x", (0, (4, 3))),
}
SIDES = {"text loss": "loss of other text, nats per token", "knowledge": "questions right"}


def draw(results: Path, out: Path) -> list[Path]:
    """Draws all that results/cpu/learning has the runs for, into out/cpu/learning."""
    files = sorted((results / "cpu" / "learning").glob("*.json"))
    if not files:
        return []
    folder = out / "cpu" / "learning"
    folder.mkdir(parents=True, exist_ok=True)
    documents = {path.stem: json.loads(path.read_text()) for path in files}
    written = []
    if "theory" in documents:
        written.append(theory(documents["theory"], folder / "theory.svg"))
    found = read(results)
    captions = {name: f"{style.machine(document)}." for name, document in documents.items()}
    if of(found, method="frozen") and len(found) > 1 and "learn" in captions:
        written.append(learning(found, folder / "learning.svg", captions["learn"]))
    if any("rank" in run for run, _ in found):
        written.append(share(found, folder / "share.svg", captions["learn"]))
    if "channels" in documents:
        written.append(channels(found, folder / "channels.svg", captions["channels"]))
    return written


def learning(found: list[Found], path: Path, caption: str) -> Path:
    """Loss on the easy test against what is forgotten: a curve a method over its rates."""
    fig, panels = plt.subplots(1, 2, figsize=(style.WIDTH, 3.9))
    frozen = of(found, method="frozen")[0][1]["measures"]
    for axes, side in zip(panels, SIDES, strict=True):
        axes.axhline(frozen[side], color="#777777", linestyle=":", linewidth=1)
        axes.plot(frozen["easy loss"], frozen[side], "k*", markersize=8, label="frozen")
        for label, fields in ENTRANTS.items():
            look, best = LOOKS[label], chosen(found, **fields)
            drawn = {"color": look.color if label != "full" else "#777777"}
            first = [f for f in of(found, **fields) if not f[0].get("seed")]
            first.sort(key=lambda f: f[0]["lr"])
            if not first:
                continue
            points = [[r["measures"][name] for _, r in first] for name in ("easy loss", side)]
            drawn["marker"] = look.marker
            axes.plot(*points, linestyle=look.dashes, markersize=4, label=label, **drawn)
            if best is None:
                continue
            at = [[r["measures"][name] for _, r in best[1]] for name in ("easy loss", side)]
            axes.plot(*at, linestyle="none", markersize=8, markeredgecolor="black", **drawn)
        axes.set(xlabel="loss on the easy test, nats per token", ylabel=SIDES[side])
    handles, labels = panels[0].get_legend_handles_labels()
    style.legend(fig, dict(zip(labels, handles, strict=True)), columns=4, bottom=0.2)
    note = "Small: rates of the grid. Large: the seeds at the chosen one."
    return style.save(fig, path, f"{note} {caption}")


def share(found: list[Found], path: Path, caption: str) -> Path:
    """What S2FT and LoRA reach with more and fewer trained numbers, one seed."""
    fig, panels = plt.subplots(1, 2, figsize=(style.WIDTH, 3.2))
    for label, runs in shares(found).items():
        look = LOOKS[label]
        trained = [result["trained parameters"] for _, result in runs]
        for axes, name in zip(panels, ("easy loss", "text loss"), strict=True):
            heights = [result["measures"][name] for _, result in runs]
            axes.plot(
                *(trained, heights),
                color=look.color,
                linestyle=look.dashes,
                marker=look.marker,
                label=label,
            )
            axes.set(xscale="log", xlabel="trained parameters", ylabel=f"{name}, nats per token")
            axes.set_xticks(trained, [f"{number / 1e6:.1f} M" for number in trained])
            axes.minorticks_off()
    handles, labels = panels[0].get_legend_handles_labels()
    style.legend(fig, dict(zip(labels, handles, strict=True)), columns=4, bottom=0.2)
    return style.save(fig, path, f"One seed. {caption}")


def channels(found: list[Found], path: Path, caption: str) -> Path:
    """Differences to random channels, paired by seed, with 95 % intervals."""
    best = chosen(found, **ENTRANTS["s2ft down"])
    if best is None:
        raise ValueError("study channels has results, study learn has none of s2ft down")
    lr, random = best
    fig, panels = plt.subplots(1, 2, figsize=(style.WIDTH, 3.2), sharey=True)
    names = [f"{strategy} {which}" for strategy in STRATEGIES for which in ("smallest", "largest")]
    for axes, name in zip(panels, ("easy loss", "text loss"), strict=True):
        for place, label in enumerate(names):
            runs = of(found, method="s2ft", projections=DOWN, channels=label)
            ours = values([f for f in runs if f[0]["lr"] == lr], measure(name))
            others = values(random, measure(name))
            differences = [ours[seed] - others[seed] for seed in ours.keys() & others.keys()]
            if not differences:
                continue
            half = interval(differences)
            axes.plot(differences, [place] * len(differences), "o", color=style.BLUE, markersize=3)
            axes.errorbar(mean(differences), place, xerr=half, fmt="kD", markersize=4, capsize=2.5)
        axes.axvline(0, color="black", linewidth=0.9, linestyle=":")
        axes.set_xlabel(f"{name} less that of random channels")
    panels[0].set(yticks=range(len(names)), yticklabels=names)
    panels[0].invert_yaxis()
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    return style.save(fig, path, f"Dots: seeds. Diamonds: mean and 95 % interval. {caption}")


def theory(document: dict, path: Path) -> Path:
    """Risks over the trained rank; S2FT beside its bounds; layers with an activation."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(style.WIDTH, 3.2))
    ranks = [each["rank"] for each in document["trade-off"]]
    for name, label in (("lora", "lora"), ("s2ft", "s2ft down")):
        for side, dashes in (("in", ":"), ("out", "-")):
            heights = [each[f"{name} {side}"] for each in document["trade-off"]]
            look = LOOKS["s2ft o + down"] if name == "s2ft" else LOOKS[label]
            drawn = {"color": look.color, "linestyle": dashes, "marker": look.marker}
            left.plot(ranks, heights, markersize=3, label=f"{name}, {side}", **drawn)
    left.set(xlabel="rank of LoRA; S2FT alike", ylabel="risk / that of the base")
    left.legend(fontsize=6.5)
    _bounds(middle, [(point[0], point[1]) for b in document["bounds"] for point in b["points"]])
    middle.set_title("linear, trained rows")
    for name, marker in (("linear", "o"), ("relu", "^"), ("gelu", "s")):
        points = [each for each in document["nonlinear"] if each["activation"] == name]
        for method, color in (("s2ft", style.BLUE), ("lora", style.ORANGE)):
            right.plot(
                [each["eps^2"] for each in points],
                [each[f"{method} out"] for each in points],
                *(marker,),
                color=color,
                markersize=5,
                label=f"{method}, {name}",
            )
    _lines(right, [each["eps^2"] for each in document["nonlinear"]])
    right.set(xlabel="eps²", title="one layer, by descent")
    right.legend(fontsize=6.5)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    note = "in, out: of distribution. Lines: 1 + eps² and 1 + 3 eps²."
    return style.save(fig, path, f"{note} {style.machine(document)}.")


def _bounds(axes: Axes, points: list[tuple[float, float]]) -> None:
    axes.plot(*zip(*points, strict=True), ".", color=style.BLUE, markersize=2)
    _lines(axes, [eps for eps, _ in points])
    axes.set(xlabel="eps²", ylabel="risk out of distribution / base")


def _lines(axes: Axes, values: list[float]) -> None:
    ends = [min(values), max(values)]
    for slope, dashes in ((1, "-"), (3, "--")):
        heights = [1 + slope * end for end in ends]
        axes.plot(ends, heights, color="black", linewidth=1, linestyle=dashes)
