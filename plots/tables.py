"""Tables of a page, made from the results as the figures are.

A table stands between the lines `<!-- NAME -->` and `<!-- /NAME -->`. What is between them is
replaced.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from plots import host, learning_tables, plan, steps, style
from plots.markdown import markdown
from plots.steps import Step

PLACE = re.compile(r"^<!-- ([^/\n].*?) -->\n", re.MULTILINE)
DEPTH = "full depth"  # in Step.options
NOT_MEASURED = "Not measured on a GPU yet; `bench/gpu.sh OUT_DIR` measures it.\n"


def update(page: Path, results: Path) -> str:
    """The text of `page` with new text in the place of each of its tables.

    Raises ValueError for a page without a place, and for a place that is not closed, comes twice,
    is of no table, or of one without results.
    """
    text = page.read_text()
    names = PLACE.findall(text)
    if not names:
        raise ValueError(f"{page} must have a place for a table, such as <!-- demo cpu -->")
    for name in names:
        if name not in TABLES:
            raise ValueError(f"places of {page} must be of {list(TABLES)}, got {name!r}")
        table = TABLES[name](results)
        text, count = re.subn(
            f"^(<!-- {name} -->\n).*?^(<!-- /{name} -->)$",
            lambda match, table=table: match[1] + table + match[2],
            text,
            flags=re.DOTALL | re.MULTILINE,
        )
        if count != 1 or names.count(name) != 1:
            raise ValueError(f"{page} must have one closed place for the table {name!r}")
    return text


def demo(document: dict) -> str:
    """The table of `demo_rows`, then what it ran on."""
    return _table(demo_rows(document), document)


def demo_rows(document: dict) -> list[list[str]]:
    """The names of the columns, then a row for each method of `python -m bench.demo`."""
    rows = [["method", "trained", "step / floor", "as run", "optimizer", "saved", "held-out loss"]]
    for entry in document["benchmarks"]:
        extra = entry["extra_info"]
        if "ratio_to_floor" not in extra:
            continue  # pre-training
        sizes, losses = extra["bytes"], extra["held_out"]["losses"]
        rows.append(
            [
                entry["name"],
                f"{extra['trained_parameters']:,}",
                _quartiles(extra["ratio_to_floor"]),
                f"{extra['ratio_as_run']:.3f}" if "ratio_as_run" in extra else "",
                *(f"{sizes[part] / 2**20:.2f}" for part in ("optimizer", "saved")),
                f"{losses[0]:.3f} → {losses[-1]:.3f}",
            ]
        )
    return rows


def host_times(document: dict) -> str:
    """Host time of a layer by method, and its ratio to the frozen model's; then the machine."""
    rows = [["method", "host ms a layer", "layer / frozen layer"]]
    for method, extra in host.by_method(document).items():
        milliseconds = f"{extra['seconds']['median'] * 1e3:.3f}"
        rows.append([style.METHODS[method].label, milliseconds, _quartiles(extra["ratio"])])
    return _table(rows, document)


def laboratory(document: dict) -> str:
    """For each model that was run a table of its largest batch in Figure 5, then what it ran on.

    A model that Figure 5 does not have is taken from the suite "tokens". The model with the most
    methods comes first. A step whose backward may end above the embedding
    is also given at the depth of the floor, where that was measured.
    """
    found = [s for s in steps.read(document, "figure5", "tokens") if not s.options]
    deep = _at_depth(document)
    largest = []
    for of_model in steps.groups(found, lambda s: s.model).values():
        of_model = [s for s in of_model if "figure5" in s.suites] or of_model
        largest.append(list(steps.groups(of_model, lambda s: s.size).values())[-1])
    largest.sort(key=lambda of_size: (-len(of_size), of_size[0].total))
    parts = [_methods(of_size, deep) for of_size in largest]
    note = " ".join([steps.NOTE, *_resolution(document)])
    return "\n\n".join([*parts, note, f"{style.machine(document)}."]) + "\n"


def short(document: dict) -> str:
    """The first table of `laboratory` in five columns."""
    found = steps.read(document, "figure5")
    models = steps.groups(found, lambda s: s.model).values()
    of_size = list(steps.groups(max(models, key=len), lambda s: s.size).values())[-1]
    unit, name = steps.byte_unit(of_size)
    deep = _at_depth(document)
    rows = [["method", "step / floor", "at equal depth", f"saved, {name}", f"peak, {name}"]]
    for step in (step for step in of_size if not step.mark):
        ratios = [_median(each) for each in (step, deep.get((step.size, step.method)))]
        sizes = [_number(size) for size in (step.saved(unit), step.peak(unit))]
        rows.append([style.METHODS[step.method].label, *ratios, *sizes])
    return f"{_heading(of_size)}:\n\n{_table(rows, document)}"


def gpu(results: Path) -> str:
    """The tables of every device but the CPU, or that there is none and which command makes one."""
    files = sorted(results.glob("*/steps.json"))
    documents = [json.loads(path.read_text()) for path in files if path.parent.name != "cpu"]
    return "\n".join(map(laboratory, documents)) or NOT_MEASURED


def plans(document: dict) -> str:
    """A row for each plan of `python -m bench.plan`, then what it was counted with."""
    return _table(plan.rows(document), document, "Counted with ")


def _table(rows: list[list[str]], document: dict, by: str = "") -> str:
    """Rows, the names of the columns first, then what they were made on."""
    return f"{markdown(rows[0], rows[1:])}\n\n{by}{style.machine(document)}.\n"


def _heading(of_size: list[Step]) -> str:
    first = of_size[0]
    return f"{first.model_name}, {first.dtype}, length {first.length:,}, batch {first.batch}"


def _methods(of_size: list[Step], deep: dict[tuple, Step]) -> str:
    """A heading, a row for each method, and why methods are missing. deep: steps at equal depth."""
    unit, name = steps.byte_unit(of_size)
    columns = ["method", "trained", "step ms", "step / floor", "equal depth / floor"]
    columns += [f"saved, {name}", f"peak, {name}"]
    rows = [_row(step, deep.get((step.size, step.method)), unit) for step in of_size]
    missing = steps.groups((s for s in of_size if s.mark == "n/a"), lambda s: s.status)
    labels = {why: [style.METHODS[s.method].label for s in found] for why, found in missing.items()}
    notes = [f"{why} ({', '.join(methods)})." for why, methods in labels.items()]
    return "\n\n".join([f"**{_heading(of_size)}:**", markdown(columns, rows), *notes])


def _row(step: Step, at_depth: Step | None, unit: float) -> list[str]:
    return [
        style.METHODS[step.method].label,
        "" if step.trained is None else f"{step.trained:,} ({step.trained / step.total:.2%})",
        _number(step.milliseconds()) or step.mark,
        _quartiles(step.ratio),
        _quartiles(None if at_depth is None else at_depth.ratio),
        _number(step.saved(unit)),
        _number(step.peak(unit)) or step.mark,
    ]


def _at_depth(document: dict) -> dict[tuple, Step]:
    """Steps whose dx is computed down to the embedding, by size and method."""
    return {(s.size, s.method): s for s in steps.read(document, "depth") if s.options == DEPTH}


def _resolution(document: dict) -> list[str]:
    """How far from 1 the floor's own ratios are; a sentence, where there are any."""
    found = [step.ratio for step in steps.read(document) if step.method == "frozen"]
    ratios = sorted(ratio["median"] for ratio in found if ratio is not None)
    if not ratios:
        return []
    between = " to ".join(dict.fromkeys(f"{ratio:.3f}" for ratio in (ratios[0], ratios[-1])))
    furthest = max(abs(ratio - 1) for ratio in ratios)
    return [
        f"Resolution: the frozen floor beside an identical one came out at {between}. Differences "
        f"below {furthest:.1%}, or within the quartiles, say nothing."
    ]


def _median(step: Step | None) -> str:
    return "" if step is None or step.ratio is None else f"{step.ratio['median']:.2f}"


def _quartiles(ratio: dict | None) -> str:
    return "{median:.3f} ({q1:.3f} to {q3:.3f})".format(**ratio) if ratio else ""


def _number(value: float | None) -> str:
    """Four digits, or all before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _from(file: str, table: Callable[[dict], str]) -> Callable[[Path], str]:
    """`table` of one file of the results."""

    def make(results: Path) -> str:
        path = results / file
        if not path.is_file():
            raise ValueError(f"a table of the page is made from {path}, which does not exist")
        return table(json.loads(path.read_text()))

    return make


# Every table that a page may have a place for, made from the folder of the results.
TABLES: dict[str, Callable[[Path], str]] = {
    "demo cpu": _from("cpu/demo.json", demo),
    "host cpu": _from("cpu/host.json", host_times),
    "steps cpu, short": _from("cpu/steps.json", short),
    "steps cpu": _from("cpu/steps.json", laboratory),
    "steps gpu": gpu,
    **learning_tables.TABLES,
    "plan": _from("predicted/plan.json", plans),
}
