"""Reads the results of bench/learning, and compares runs seed by seed."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev

# 97.5 % quantiles of Student's t distribution, by degrees of freedom
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
NO_DIFFERENCE = "no difference shown"
MEASURES = ("easy loss", "easy exact", "hard loss", "knowledge", "text loss")
# of a run: what tells it from another of the same entrant
SETTINGS = ("lr", "seed")
DOWN = ["down_proj"]
GRID = 3  # learning rates that are tried of every method

# The entrants of study `learn` by their labels, in the order of tables and figures.
ENTRANTS: dict[str, dict] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "dora": {"method": "dora"},
    "shira": {"method": "shira"},
    "spiel": {"method": "spiel"},
    "s2ft o + down": {"method": "s2ft"},
    "s2ft down": {"method": "s2ft", "projections": DOWN},
}

Found = tuple[dict, dict]  # a run and its result
Table = tuple[list[str], list[list[str]]]  # columns and rows
Values = dict[int, float]  # by seed


def read(results: Path) -> list[Found]:
    """Every run in results/cpu/learning, of the protocol, model and data of the latest one."""
    entries = []
    for path in sorted((results / "cpu" / "learning").glob("*.json")):
        entries += json.loads(path.read_text()).get("runs", [])
    if not entries:
        return []
    latest = entries[-1]["common"]
    return [(entry["run"], entry["result"]) for entry in entries if entry["common"] == latest]


def of(found: Iterable[Found], **fields) -> list[Found]:
    """Runs whose fields beside rate and seed are exactly these; None for one that is not there."""
    wanted = {name: value for name, value in fields.items() if value is not None}
    return [
        (run, result)
        for run, result in found
        if {name: value for name, value in run.items() if name not in SETTINGS} == wanted
    ]


def chosen(found: list[Found], **fields) -> tuple[float, list[Found]] | None:
    """The rate with the lowest validation loss at the first seed, and the runs at it by seed.

    None until the whole grid was tried, and a higher rate where its highest is the best.
    """
    runs = of(found, **fields)
    first = {run["lr"]: result["validation loss"] for run, result in runs if not run.get("seed")}
    if len(first) < GRID:
        return None
    lr = min(first, key=first.__getitem__)
    if lr == max(first) and len(first) == GRID:
        return None
    return lr, sorted((f for f in runs if f[0]["lr"] == lr), key=lambda f: f[0].get("seed", 0))


def values(runs: Iterable[Found], get: Callable[[dict], float]) -> Values:
    return {run.get("seed", 0): get(result) for run, result in runs}


def interval(differences: list[float]) -> float | None:
    """Half the 95 % interval of a mean, by Student's t; None for fewer than two numbers."""
    if len(differences) < 2:
        return None
    return QUANTILES[len(differences) - 1] * stdev(differences) / len(differences) ** 0.5


def compared(ours: Values, others: Values) -> str:
    """The mean difference, paired by seed, its interval, and whether it shows anything."""
    seeds = sorted(ours.keys() & others.keys())
    differences = [ours[seed] - others[seed] for seed in seeds]
    if not seeds:
        return ""
    if len(seeds) == 1:
        return f"{differences[0]:+.3f} (one seed)"
    centre, half = mean(differences), interval(differences)
    text = f"{centre:+.3f} ({centre - half:+.3f} to {centre + half:+.3f})"
    return f"{text}, {NO_DIFFERENCE}" if abs(centre) <= half else text


def averaged(found: Values) -> str:
    """The mean over the seeds, with half its 95 % interval."""
    numbers = list(found.values())
    half = interval(numbers)
    return f"{mean(numbers):.3f}" + ("" if half is None else f" ± {half:.3f}")
