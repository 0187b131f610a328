"""Tables of the laboratory: every method's step beside the frozen floor, and what was modelled."""

import json
from pathlib import Path

from plots import floors, steps, style
from plots.steps import Step

COLUMNS = ["method", "trained", "step ms", "modelled", "step / floor", "modelled"]
DEPTH = "full depth"  # in Step.options of a step whose dx is computed down to the embedding
NOT_MEASURED = "Not measured on a GPU yet; `bench/gpu.sh OUT_DIR` measures it.\n"


def gpu_tables(results: Path) -> str:
    """The tables of every device but the CPU, or that there is none and which command makes one."""
    files = sorted(results.glob("*/steps.json"))
    documents = [json.loads(path.read_text()) for path in files if path.parent.name != "cpu"]
    return "\n".join(map(tables, documents)) or NOT_MEASURED


def tables(document: dict) -> str:
    """Markdown: for each model its largest batch in the first suite that has it; what it ran on.

    Two cuts of one shape are two models; the one with the most methods comes first. A step whose
    backward may end above the embedding is also given at the depth of the floor, where that was
    measured. Below them all, what the milliseconds are and how small a difference says something.
    """
    largest: dict[object, list[Step]] = {}
    for suite in ("figure5", "tokens"):
        models = steps.groups(steps.read(document, suite), lambda step: step.cut)
        for model, found in models.items():
            *_, last = steps.groups(found, lambda step: step.setting).values()
            largest.setdefault(model, last)
    deep = {(s.size, s.method): s for s in steps.read(document, "depth") if s.options == DEPTH}
    settings = sorted(largest.values(), key=lambda found: (-len(found), found[0].total))
    parts = [_table(found, deep) for found in settings]
    note = " ".join([floors.NOTE, *_resolution(document)])
    return "\n\n".join([*parts, note, f"{style.machine(document)}."]) + "\n"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table: the first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, rule, *rows])


def _table(of_setting: list[Step], deep: dict[tuple, Step]) -> str:
    """A heading, a row for each method, and notes. deep: steps at equal depth, by size, method."""
    first = of_setting[0]
    unit, name = steps.byte_unit(of_setting)
    heading = (
        f"**{first.model_name}**, {first.dtype}, length {first.length:,}, batch {first.batch}; "
        f"memory in {name}:"
    )
    floor = next((step for step in of_setting if step.method == "frozen"), None)
    rows = [_row(step, floor, unit) for step in of_setting]
    columns = [*COLUMNS, "saved", "modelled", "peak", "modelled"]
    at_depth = [deep.get((step.size, step.method)) for step in of_setting]
    if any(at_depth):
        place = len(COLUMNS)
        columns.insert(place, "equal depth / floor")
        for row, step in zip(rows, at_depth, strict=True):
            row.insert(place, "" if step is None else _ratio(step))
    table = markdown(columns, rows)
    return "\n\n".join([heading, table, *_notes(of_setting)])


def _resolution(document: dict) -> list[str]:
    """How far from 1 the floor's own ratios are, of all suites; a sentence, where there are any."""
    found = [s.ratio for s in steps.references(document).values() if s.method == "frozen"]
    ratios = sorted(ratio["median"] for ratio in found if ratio is not None)
    if not ratios:
        return []
    between = " to ".join(dict.fromkeys(f"{ratio:.3f}" for ratio in (ratios[0], ratios[-1])))
    furthest = max(abs(ratio - 1) for ratio in ratios)
    return [
        f"Resolution: the frozen floor beside an identical one came out at {between}; differences "
        f"below {furthest:.1%}, or within the quartiles, say nothing."
    ]


def _notes(of_setting: list[Step]) -> list[str]:
    """Why something is not available, and where the model is known not to fit: at most a line."""
    missing = [(step, step.status) for step in of_setting if step.mark == "n/a"]
    misfits = [(step, step.model["fits"]) for step in of_setting if _misfit(step)]
    notes = []
    for start, reasons in (("", missing), ("† Not in the model: ", misfits)):
        labels: dict[str, list[str]] = {}
        for step, reason in reasons:
            labels.setdefault(reason, []).append(style.METHODS[step.method].label)
        if labels:
            words = [f"{reason} ({', '.join(names)})" for reason, names in labels.items()]
            notes.append(f"{start}{'; '.join(words)}.")
    return [" ".join(notes)] if notes else []


def _misfit(step: Step) -> bool:
    return step.model is not None and step.model["fits"] is not None


def _row(step: Step, floor: Step | None, unit: float) -> list[str]:
    saved = None if step.bytes is None else step.bytes["saved"]
    modelled_saved = modelled_ratio = None
    if step.model is not None:
        modelled_saved = step.model["saved"]
        if floor is not None and floor.model is not None:
            modelled_ratio = step.model["seconds"] / floor.model["seconds"]
    return [
        style.METHODS[step.method].label + (" †" if _misfit(step) else ""),
        "" if step.trained is None else f"{step.trained:,} ({step.trained / step.total:.2%})",
        _number(step.milliseconds()) or step.mark,
        _number(step.modelled_milliseconds()),
        _ratio(step),
        "" if modelled_ratio is None else f"{modelled_ratio:.3f}",
        _number(None if saved is None else saved / unit),
        _number(None if modelled_saved is None else modelled_saved / unit),
        _number(step.peak(unit)) or step.mark,
        _number(step.modelled_peak(unit)),
    ]


def _ratio(step: Step) -> str:
    return "" if step.ratio is None else "{median:.3f} ({q1:.3f} to {q3:.3f})".format(**step.ratio)


def _number(value: float | None) -> str:
    """Four digits, or all before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
