"""The tables of the README, made from the results as the figures are.

A table stands between the lines `<!-- NAME -->` and `<!-- /NAME -->`; whatever is between them is
replaced.
"""

import json
import re
from pathlib import Path

from plots import style


def update(readme: Path, results: Path) -> str:
    """The text of `readme` with every table made anew; raises ValueError where one has no place."""
    text = readme.read_text()
    tables = {"demo cpu": demo_table(json.loads((results / "cpu" / "demo.json").read_text()))}
    for name, table in tables.items():
        text, count = re.subn(
            f"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda match, table=table: match[1] + table + match[2],
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"{readme} must have one place for the table {name!r}, got {count}")
    return text


def demo_table(document: dict) -> str:
    """Markdown: a row for each method of `python -m bench.demo`, then what it ran on."""
    columns = ["method", "trained", "step ms", "step / floor", "as run", "weights"]
    columns += ["gradients", "optimizer", "saved", "held-out loss"]
    rows = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
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
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", f"{style.machine(document)}."]) + "\n"
