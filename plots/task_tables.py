"""Tables of docs/learning.md about several tasks: fused, in a row, and the channels they choose."""

from plots.studies import ENTRANTS, Found, Table, Values, averaged, compared, of, values

TASKS = ("math", "choice", "docs")


def fusion(found: list[Found]) -> list[Table]:
    """Each task with its own adapter, with the other's, and fused; then who lost less, by seed."""
    states = {
        "math adapter": lambda result: result["alone"]["math"]["tasks"],
        "choice adapter": lambda result: result["alone"]["choice"]["tasks"],
        "fused, weight 0.5": lambda result: result["fused"]["0.5"],
        "fused, weight 1": lambda result: result["fused"]["1.0"],
    }
    lora, same, disjoint = "lora", "s2ft down, same channels", "s2ft down, disjoint channels"
    entrants = {
        lora: ENTRANTS["lora"],
        same: ENTRANTS["s2ft down"],
        disjoint: ENTRANTS["s2ft down"] | {"disjoint": True},
    }
    runs_of = {
        label: of(found, **fields, kind="fuse", tasks=["math", "choice"])
        for label, fields in entrants.items()
    }

    def losses(label: str, state: str, task: str, measured: str = "validation loss") -> Values:
        return values(runs_of[label], lambda result: states[state](result)[task][measured])

    rows = [
        [
            *(label, state, str(len(runs))),
            *(
                averaged(losses(label, state, task, measured))
                for task in ("math", "choice")
                for measured in ("validation loss", "test")
            ),
        ]
        for label, runs in runs_of.items()
        for state in states
        if runs
    ]
    columns = ["method", "model", "seeds", "math loss", "math exact", "choice loss", "choice right"]
    if not all(runs_of.values()):
        return [(columns, rows)]
    fused = [(state, task) for state in list(states)[2:] for task in ("math", "choice")]
    differences = [
        [f"{label} less {other}", *(compared(losses(label, *f), losses(other, *f)) for f in fused)]
        for label, other in ((same, lora), (disjoint, lora), (disjoint, same))
    ]
    return [
        (columns, rows),
        (["difference", *(f"{state}: {task} loss" for state, task in fused)], differences),
    ]


def sequential(found: list[Found]) -> list[Table]:
    """Validation losses after the last task, and how each changed since it was trained."""
    rows = []
    for label, fields in {
        "full": ENTRANTS["full"],
        "lora": ENTRANTS["lora"],
        "s2ft down, same channels": ENTRANTS["s2ft down"],
        "s2ft down, disjoint channels": ENTRANTS["s2ft down"] | {"disjoint": True},
    }.items():
        for _, result in of(found, **fields, kind="sequence", tasks=list(TASKS)):
            stages = [stage["tasks"] for stage in result["stages"]]
            cells = []
            for place, task in enumerate(TASKS):
                own, last = (
                    stage[task]["validation loss"] for stage in (stages[place], stages[-1])
                )
                cells.append(f"{last:.3f} ({last - own:+.3f})")
            rows.append([label, *cells])
    return [(["method", *(f"{task} loss (change)" for task in TASKS)], rows)] if rows else []


def overlap(found: list[Found]) -> list[Table]:
    """Channels that two tasks share, and the energy of a full update in the chosen ones."""
    results = of(found, method="full", kind="overlap", tasks=list(TASKS))
    if not results:
        return []
    result = results[-1][1]
    chance = f"{result['chance']:.3f}"
    shared = [
        [*each["tasks"], each["channels"], f"{each['overlap']:.3f}", chance]
        for each in result["overlap"]
    ]
    energy = [
        [each["task"], each["channels"], f"{each['energy']:.3f}", chance]
        for each in result["energy"]
    ]
    return [
        (["task", "other task", "channels", "shared", "by chance"], shared),
        (["task", "channels", "share of the energy", "of the channels"], energy),
    ]


TABLES = (fusion, sequential, overlap)
