"""The source of s2kernels.kernels.tuned, from the measurements of bench.tune.

It is a function of bench/results/*/tune.json alone: equal measurements, equal file.
"""

import json
import textwrap
from collections import defaultdict
from itertools import groupby
from pathlib import Path

HEAD = '''"""Launch parameters and Triton's wins, as measured, by `python -m bench.tune`.

LAUNCH: (arch, op, "half" or "float32") -> sizes -> tokens -> launch parameters. What is not
listed, and an empty entry, runs with the defaults beside its kernel.

FASTER: (device, op, dtype) -> (N, K) -> ranges of M, ends included, at each measured M of which
Triton was faster than torch by more than the spread. Elsewhere `s2kernels.backend` takes torch.
"""

# fmt: off

Launches = dict[tuple[int, ...], dict[int, dict[str, int]]]
Ranges = tuple[tuple[int, int], ...]
'''


def measurements(results: Path) -> list[dict]:
    """The extra_info of every problem measured on any device, in the order of the files' names."""
    files = sorted(results.glob("*/tune.json"))
    return [
        entry["extra_info"]
        for file in files
        for entry in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
        if entry["stats"] is not None  # it failed
    ]


def source(measured: list[dict]) -> str:
    """The text of tuned.py."""
    lines = [HEAD]
    lines += _table("LAUNCH: dict[tuple[str, str, str], Launches]", _launches(measured), _launch)
    lines.append("")
    annotation = "FASTER: dict[tuple[str, str, str], dict[tuple[int, int], Ranges]]"
    lines += _table(annotation, _wins(measured), lambda ranges: [f"{ranges},"])
    return "\n".join(lines) + "\n"


def _launches(measured: list[dict]) -> dict:
    """LAUNCH, without the sizes that run best with the defaults at every number of tokens."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for info in measured:
        dtype = "float32" if info["dtype"] == "float32" else "half"
        key = info["arch"], info["op"], dtype
        found[key][tuple(info["sizes"])][info["tokens"]] = info["launch"]
    tuned = {
        key: {sizes: tokens for sizes, tokens in by_sizes.items() if any(tokens.values())}
        for key, by_sizes in found.items()
    }
    return {key: by_sizes for key, by_sizes in tuned.items() if by_sizes}


def _wins(measured: list[dict]) -> dict:
    """FASTER: runs of neighbouring measured M at which Triton won."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for info in measured:
        if info["op"] != "slice_grad":  # Triton's anyway: torch has no sum into the gradient
            key = info["device"], info["op"], info["dtype"]
            found[key][tuple(info["sizes"])][info["tokens"]] = info["wins"]
    wins: dict = {}
    for key, by_sizes in found.items():
        for sizes, by_tokens in by_sizes.items():
            runs = groupby(sorted(by_tokens.items()), key=lambda item: item[1])
            ranges = tuple(
                (run[0], run[-1]) for won, items in runs if won for run in [[m for m, _ in items]]
            )
            if ranges:
                wins.setdefault(key, {})[sizes] = ranges
    return wins


def _table(annotation: str, table: dict, value_lines) -> list[str]:
    """Assignment of a nested dict, its keys in order and quoted as the formatter would."""
    if not table:
        return [f"{annotation} = {{}}"]
    lines = [f"{annotation} = {{"]
    for key, by_sizes in sorted(table.items()):
        lines.append(f"    {_quoted(key)}: {{")
        for sizes, value in sorted(by_sizes.items()):
            first, *others = value_lines(value)
            lines.append(f"        {sizes}: {first}")
            lines += [f"        {line}" for line in others]
        lines.append("    },")
    return [*lines, "}"]


def _quoted(key: tuple[str, ...]) -> str:
    return "(" + ", ".join(f'"{word}"' for word in key) + ")"


def _launch(by_tokens: dict[int, dict]) -> list[str]:
    lines = ["{"]
    for tokens, launch in sorted(by_tokens.items()):
        arguments = ", ".join(f"{name}={value}" for name, value in launch.items())
        text = f"    {tokens}: " + (f"dict({arguments})," if launch else "{},")
        lines += textwrap.wrap(text, 90, subsequent_indent="        ", initial_indent="    ")
    return [*lines, "},"]
