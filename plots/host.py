"""Host time of a layer in a step, beside the frozen model's: results/<device>/host.json."""

from pathlib import Path

from plots import style

NOTE = "Python and dispatch of one layer in one step: a toy Llama, one thread, GPU code path."


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws the ratio of each method to the frozen model, median and quartiles of rounds."""
    found = by_method(document)
    ratios = {method: extra["ratio"] for method, extra in found.items()}
    notes = [f"({extra['seconds']['median'] * 1e3:.2f} ms)" for extra in found.values()]
    fig = style.ratio_bars(
        *(ratios, style.METHODS, notes),
        "host time of a layer / frozen floor, of the same round (median and quartiles)",
    )
    return [style.save(fig, folder / "host.svg", f"{NOTE}\n{style.machine(document)}.")]


def by_method(document: dict) -> dict[str, dict]:
    """What was measured of each method, in the order of all figures."""
    found = {each["params"]["method"]: each["extra_info"] for each in document["benchmarks"]}
    return {method: found[method] for method in style.METHODS if method in found}
