"""The tables of the README, made from the results as the figures are.

A table stands between the lines `<!-- NAME -->` and `<!-- /NAME -->`; whatever is between them is
replaced.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from plots import laboratory, style

PLACE = re.compile(r"^<!-- ([^/\n].*?) -->\n", re.MULTILINE)


def update(readme: Path, results: Path) -> str:
    """The text of `readme` with every table that it has a place for made anew.

    Raises ValueError for a page without a place, and for a place that is not closed, comes twice,
    is of no table, or of one without results.
    """
    text = readme.read_text()
    names = PLACE.findall(text)
    if not names:
        raise ValueError(f"{readme} must have a place for a table, such as <!-- demo cpu -->")
    for name in names:
        if name not in TABLES:
            raise ValueError(f"places of {readme} must be of {list(TABLES)}, got {name!r}")
        table = TABLES[name](results)
        text, count = re.subn(
            f"^(<!-- {name} -->\n).*?^(<!-- /{name} -->)$",
            lambda match, table=table: match[1] + table + match[2],
            text,
            flags=re.DOTALL | re.MULTILINE,
        )
        if count != 1 or names.count(name) != 1:
            raise ValueError(f"{readme} must have one closed place for the table {name!r}")
    return text


def demo_table(document: dict) -> str:
    """Markdown: a row for each method of `python -m bench.demo`, then what it ran on."""
    columns = ["method", "trained", "step ms", "step / floor", "as run", "weights"]
    columns += ["gradients", "optimizer", "saved", "held-out loss"]
    rows = []
    for entry in document["benchmarks"]:
        extra = entry["extra_info"]
        if "ratio_to_floor" not in extra:
            continue  # pre-training
        ratio, sizes, losses = extra["ratio_to_floor"], extra["bytes"], extra["held_out"]["losses"]
        parts = ("weights", "gradients", "optimizer", "saved")
        rows.append(
            [
                entry["name"],
                f"{extra['trained_parameters']:,}",
                f"{entry['stats']['median'] * 1e3:.1f}",
                f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})",
                f"{extra['as_run']['ratio_to_floor']:.3f}" if "as_run" in extra else "",
                *(f"{sizes[part] / 2**20:.2f}" for part in parts),
                f"{losses[0]:.3f} → {losses[-1]:.3f}",
            ]
        )
    return f"{laboratory.markdown(columns, rows)}\n\n{style.machine(document)}.\n"


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
    "demo cpu": _from("cpu/demo.json", demo_table),
    "laboratory cpu": _from("cpu/steps.json", laboratory.tables),
    "laboratory gpu": laboratory.gpu_tables,
}
