"""Every figure, redrawn from the committed JSON alone: python -m plots."""

import json
from pathlib import Path

from plots import demo

# A results file results/<device>/<suite>.json is drawn by its suite into figures/<device>/.
SUITES = {"demo": demo.draw}


def draw_file(path: Path, out: Path) -> list[Path]:
    """Draws one results file; returns the figures written, none for a suite without figures."""
    draw = SUITES.get(path.stem)
    if draw is None:
        return []
    folder = out / path.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    return draw(json.loads(path.read_text()), folder)


def draw_all(results: Path, out: Path) -> list[Path]:
    """Draws every results/<device>/<suite>.json."""
    return [figure for path in sorted(results.glob("*/*.json")) for figure in draw_file(path, out)]
