"""Launch parameters and Triton's wins, as measured by `python -m bench.kernels.tune`: tuned.json.

Two lists of rows. What is not listed runs with the defaults beside its kernel.

    launch   arch, op, dtype ("half" or "float32"), sizes, tokens, launch: the fastest parameters;
             an empty launch stands for the default
    faster   device, op, dtype, sizes (N, K), tokens: ranges of M, ends included, at each measured M
             of which Triton was faster than torch by more than the spread
"""

import json
from pathlib import Path

PATH = Path(__file__).with_name("tuned.json")

Sizes = tuple[int, ...]
Key = tuple[str, str, str]


def read(path: Path) -> tuple[dict, dict]:
    """LAUNCH and FASTER of a file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    launch: dict[Key, dict[Sizes, dict[int, dict[str, int]]]] = {}
    for row in document["launch"]:
        by_sizes = launch.setdefault((row["arch"], row["op"], row["dtype"]), {})
        by_sizes.setdefault(tuple(row["sizes"]), {})[row["tokens"]] = row["launch"]
    faster: dict[Key, dict[Sizes, tuple[tuple[int, int], ...]]] = {}
    for row in document["faster"]:
        ranges = tuple((first, last) for first, last in row["tokens"])
        key = row["device"], row["op"], row["dtype"]
        faster.setdefault(key, {})[tuple(row["sizes"])] = ranges
    return launch, faster


# LAUNCH: (arch, op, dtype) -> sizes -> tokens -> parameters.
# FASTER: (device, op, dtype) -> (N, K) -> ranges of tokens.
LAUNCH, FASTER = read(PATH)
