"""From cuts of few layers to the whole model: what all layers would take, and what they do take.

A step of n layers is a fixed part (embedding, head, loss) and n equal ones, so two depths are
enough: q(n) = q(a) + (n - a) (q(b) - q(a)) / (b - a). Where the whole model was measured too, the
line says how far off this is. Times are ratios to the floor times one floor for a size: the cases
were measured minutes apart.
"""

from collections.abc import Iterator

from bench import quiet

QUANTITIES = {"step ms": 1e-3, "peak MiB": 2**20}


def line_through(a: int, at_a: float, b: int, at_b: float, n: int) -> float:
    """The value at n layers of the line through the values at a and b layers."""
    return at_a + (n - a) * (at_b - at_a) / (b - a)


def lines(entries: list[dict]) -> Iterator[str]:
    """A line of text for each method and size of which two cuts were measured."""
    references = quiet.references(entries)
    for by_layers in _series(entries).values():
        cuts = sorted(layers for layers, entry in by_layers.items() if _is_cut(entry))
        if len(cuts) < 2:
            continue
        a, b = cuts[:2]
        params = by_layers[a]["params"]
        whole = params["of_layers"]
        words = []
        for name, unit in QUANTITIES.items():
            values = {
                layers: _quantity(entry, name, references) / unit
                for layers, entry in by_layers.items()
            }
            expected = line_through(a, values[a], b, values[b], whole)
            words.append(f"{name} {expected:.1f}" + _beside(values.get(whole), expected))
        size = f"{params['batch']}x{params['length']}"
        yield (
            f"{params['shape']} {size} {params['method']}: extrapolated from {a} and {b} layers "
            f"to {whole}: {', '.join(words)}"
        )


def _series(entries: list[dict]) -> dict[tuple, dict[int, dict]]:
    """Entries by all of their case but the layers; measured ones only."""
    series: dict[tuple, dict[int, dict]] = {}
    for entry in entries:
        if entry["stats"] is not None:
            params = entry["params"]
            names = ("shape", "vocab", "batch", "length", "dtype", "method", "share")
            options = tuple(params["options"].values())
            key = (entry["group"], *(params[name] for name in names), options)
            series.setdefault(key, {})[params["layers"]] = entry
    return series


def _is_cut(entry: dict) -> bool:
    return entry["params"]["layers"] < entry["params"]["of_layers"]


def _quantity(entry: dict, name: str, references: dict[tuple, float]) -> float:
    extra = entry["extra_info"]
    if name == "step ms":
        return extra["ratio_to_floor"]["median"] * references[quiet.floor_of(entry)]
    return extra["bytes"]["peak"]


def _beside(measured: float | None, expected: float) -> str:
    if measured is None:
        return " (not measured)"
    return f" (measured {measured:.1f}: {expected / measured - 1:+.1%})"
