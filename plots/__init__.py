"""Every figure, drawn from the committed JSON alone: python -m plots."""

import json
from pathlib import Path

from plots import bars, demo, density, host, kernels, learning, lines, plan, serving

# A results file results/<device>/<suite>.json is drawn by these, into figures/<device>/.
SUITES = {
    "demo": (demo.draw,),
    "figure6": (serving.draw,),
    "host": (host.draw,),
    "ops": (kernels.draw,),
    "plan": (plan.draw,),
    "steps": (bars.draw, lines.draw, density.draw),
    "tenants": (serving.draw_tenants,),
}


def draw_file(path: Path, out: Path) -> list[Path]:
    """Draws one results file; returns the figures written, none for a suite without figures."""
    if path.stem not in SUITES:
        return []
    folder = out / path.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    document = json.loads(path.read_text())
    return [figure for draw in SUITES[path.stem] for figure in draw(document, folder)]


def draw_all(results: Path, out: Path) -> list[Path]:
    """Draws every results/<device>/<suite>.json, and the studies in results/cpu/learning."""
    drawn = [figure for path in sorted(results.glob("*/*.json")) for figure in draw_file(path, out)]
    return drawn + learning.draw(results, out)
