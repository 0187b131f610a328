"""Tables of docs/learning.md, from the results of bench/learning."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from plots import task_tables
from plots.markdown import markdown
from plots.studies import (
    DOWN,
    ENTRANTS,
    MEASURES,
    Found,
    Table,
    averaged,
    chosen,
    compared,
    of,
    read,
    values,
)

STRATEGIES = ("weight", "activation", "product", "gradient")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
COMMAND = "`python -m bench.learning {} --model DIR --data DIR --resume`"

# Runs of each study, without rates beyond the grid; what studies share is counted once.
NEEDED = {
    **{"learn": 42, "channels": 24, "projections": 7, "fusion": 9, "sequential": 4},
    **{"overlap": 1, "spiel": 14, "memory": 7},
}


def measure(name: str) -> Callable[[dict], float]:
    if name == "validation loss":
        return lambda result: result[name]
    return lambda result: result["measures"][name]


def learn(found: list[Found]) -> list[Table]:
    """Every method at its chosen rate; then its difference to LoRA."""
    names = ("validation loss", *MEASURES)
    rows, runs_of = [], {}
    for run, result in of(found, method="frozen"):
        cells = [averaged(values([(run, result)], measure(name))) for name in names]
        rows.append(["frozen", "0", "", "1", "", *cells])
    for label, fields in ENTRANTS.items():
        best = chosen(found, **fields)
        if best is None:
            continue
        lr, runs = best
        runs_of[label] = runs
        trained = f"{runs[0][1]['trained parameters']:,}"
        loss = averaged(values(runs, lambda result: mean(result["losses"][-10:])))
        cells = [averaged(values(runs, measure(name))) for name in names]
        rows.append([label, trained, f"{lr:g}", str(len(runs)), loss, *cells])
    columns = ["method", "trained", "rate", "seeds", "train loss", *names]
    tables = [(columns, rows)]
    if "lora" in runs_of:
        tables.append(_differences(runs_of, "lora"))
    return tables


def grid(found: list[Found]) -> list[Table]:
    """Every rate of the grid at the first seed."""
    rows = []
    for label, fields in ENTRANTS.items():
        for run, result in of(found, **fields):
            if not run.get("seed"):
                rows.append([label, f"{run['lr']:g}", *_numbers(result)])
    return [(["method", "rate", "validation loss", *MEASURES], rows)]


def shares(found: list[Found]) -> dict[str, list[Found]]:
    """LoRA and S2FT at their chosen rates and the first seed, from few trained numbers to many."""
    lora, s2ft = ENTRANTS["lora"], ENTRANTS["s2ft down"]
    few = {"lora": lora | {"projections": DOWN, "rank": 2}, "s2ft down": s2ft | {"units": [1, 7]}}
    runs_of = {}
    for label, fields in {"lora": lora, "s2ft down": s2ft}.items():
        best = chosen(found, **fields)
        if best is None:
            continue
        runs = best[1][:1] + of(found, **few[label])
        for rank in {run["rank"] for run, _ in found if "rank" in run}:
            runs += of(found, **fields, rank=rank)
        runs_of[label] = sorted(runs, key=lambda f: f[1]["trained parameters"])
    return runs_of


def share(found: list[Found]) -> list[Table]:
    """What S2FT and LoRA reach with more and fewer trained numbers, one seed."""
    rows = [
        [label, f"{result['trained parameters']:,}", *_numbers(result)]
        for label, runs in shares(found).items()
        for _, result in runs
    ]
    return [(["method", "trained", "validation loss", *MEASURES], rows)]


def channels(found: list[Found]) -> list[Table]:
    """S2FT on down_proj by the score of its channels, beside random ones."""
    best = chosen(found, **ENTRANTS["s2ft down"])
    if best is None:
        return []
    lr, random = best
    runs_of = {"random": random}
    for strategy in STRATEGIES:
        for which in ("smallest", "largest"):
            name = f"{strategy} {which}"
            runs = of(found, method="s2ft", projections=DOWN, channels=name)
            if runs:
                runs_of[name] = [f for f in runs if f[0]["lr"] == lr]
    if len(runs_of) == 1:
        return []
    return [_measured(runs_of), _differences(runs_of, "random")]


def projections(found: list[Found]) -> list[Table]:
    runs_of = {}
    for name in PROJECTIONS:
        # o and down alone are other defaults, but their units are named
        runs = of(found, method="s2ft", projections=[f"{name}_proj"], units=[1, 64])
        if runs:
            runs_of[name] = runs
    return [_measured(runs_of)] if runs_of else []


def spiel(found: list[Found]) -> list[Table]:
    """What grows, replacement on and off; then the density."""
    runs_of = {}
    for label, method in (("AG", "spiel"), ("MA", "spiel_ma")):
        best = chosen(found, method=method)
        if best is not None:
            lr, runs_of[label] = best
            still = of(found, method=method, replace=False)
            runs_of[f"{label}, nothing replaced"] = [f for f in still if f[0]["lr"] == lr]
    runs_of = {label: runs for label, runs in runs_of.items() if runs}
    if len(runs_of) < 2:
        return []
    best = chosen(found, **ENTRANTS["lora"])
    if best is not None:
        runs_of["lora"] = best[1]
    tables = [_measured(runs_of)]
    if "lora" in runs_of:
        tables.append(_differences(runs_of, "lora"))
    tables += [
        _differences(
            {n: r for n, r in runs_of.items() if n.startswith(rule)}, f"{rule}, nothing replaced"
        )
        for rule in ("AG", "MA")
        if f"{rule}, nothing replaced" in runs_of
    ]
    dense = {
        f"density {run['density']:g}": [(run, result)]
        for run, result in found
        if run["method"] == "spiel" and "density" in run and "kind" not in run
    }
    return [*tables, *([_measured(dense)] if dense else [])]


def memory(found: list[Found]) -> list[Table]:
    """Bytes per trained entry; whether gradients are local."""
    rows = [
        [
            {"spiel": "AG", "spiel_ma": "MA"}[run["method"]],
            f"{run['density']:.1%}",
            f"{result['entries']:,}",
            *(f"{result[name]:.1f}" for name in ("open", "closed", "least")),
        ]
        for run, result in found
        if run.get("kind") == "bytes"
    ]
    tables = [(["growth", "density", "entries", "window open", "closed", "least"], rows)]
    for _, result in of(found, method="spiel", kind="locality"):
        local = [
            [name, f"{each['correlation']:.3f}", f"{each['found']:.3f}", f"{result['chance']:g}"]
            for name, each in result["projections"].items()
        ]
        tables.append((["projection", "correlation", "top 1 % found", "by chance"], local))
    return tables if rows else []


def state(results: Path) -> str:
    """How many runs of each study there are, and how long one took."""
    rows = []
    for study, needed in NEEDED.items():
        path = results / "cpu" / "learning" / f"{study}.json"
        runs = json.loads(path.read_text())["runs"] if path.is_file() else []
        seconds = sorted(run["result"].get("seconds in all", 0.0) for run in runs)
        between = f"{seconds[0]:.0f} to {seconds[-1]:.0f}" if seconds else ""
        rows.append([study, str(len(runs)), str(needed), between])
    return _text([(["study", "runs done", "needed", "seconds a run"], rows)])


def theory(results: Path) -> str:
    """How often each bound is broken; a layer with an activation, by gradient descent."""
    path = results / "cpu" / "learning" / "theory.json"
    if not path.is_file():
        return "Not run yet: `python -m bench.learning theory`.\n"
    document = json.loads(path.read_text())
    names = list(document["bounds"][0]["broken"])
    bounds = [
        [
            f"{each['rank']}, {each['rank of the shift']}",
            *(f"{each['broken'][name]} of {each['seeds']}" for name in names),
            f"{each['equation off by']:.0e}",
        ]
        for each in document["bounds"]
    ]
    descents = [
        [each["method"], f"{each['closed form']:.4f}", f"{each['descent']:.4f}"]
        for each in document["descent"]
    ]
    columns = ("eps^2", "shift", "s2ft in", "s2ft out", "lora in", "lora out")
    layers = [
        [f"{each['activation']}, seed {each['seed']}", *(f"{each[name]:.3f}" for name in columns)]
        for each in document["nonlinear"]
    ]
    return _text(
        [
            (
                ["rank r, rank of the shift", *(f"broken: {n}" for n in names), "equation off"],
                bounds,
            ),
            (["method", "closed form", "gradient descent"], descents),
            (["layer", *columns], layers),
        ]
    )


def _numbers(result: dict) -> list[str]:
    """What one run measured."""
    return [f"{measure(name)(result):.3f}" for name in ("validation loss", *MEASURES)]


def _measured(runs_of: dict[str, list[Found]]) -> Table:
    names = ("validation loss", *MEASURES)
    rows = [
        [
            label,
            f"{runs[0][1]['trained parameters']:,}",
            str(len(runs)),
            *(averaged(values(runs, measure(name))) for name in names),
        ]
        for label, runs in runs_of.items()
    ]
    return ["", "trained", "seeds", *names], rows


def _differences(runs_of: dict[str, list[Found]], reference: str) -> Table:
    """Each less `reference`, paired by seed."""
    others = runs_of[reference]
    rows = [
        [
            label,
            *(compared(values(runs, measure(m)), values(others, measure(m))) for m in MEASURES),
        ]
        for label, runs in runs_of.items()
        if label != reference
    ]
    return [f"less {reference}", *MEASURES], rows


def _text(tables: list[Table]) -> str:
    return "\n\n".join(markdown(columns, rows) for columns, rows in tables) + "\n"


def _of(study: str, table: Callable[[list[Found]], list[Table]]) -> Callable[[Path], str]:
    def make(results: Path) -> str:
        tables = [each for each in table(read(results)) if each[1]]
        return (
            _text(tables) if tables else f"Not run yet, or not enough: {COMMAND.format(study)}.\n"
        )

    return make


TABLES: dict[str, Callable[[Path], str]] = {
    "learning state": state,
    "learning theory": theory,
    "learning learn": _of("learn", learn),
    "learning grid": _of("learn", grid),
    "learning share": _of("learn", share),
} | {
    f"learning {table.__name__}": _of(table.__name__, table)
    for table in (channels, projections, *task_tables.TABLES, spiel, memory)
}
