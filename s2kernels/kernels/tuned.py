"""Launch parameters and Triton's wins, as measured, by `python -m bench.tune`.

LAUNCH: (arch, op, "half" or "float32") -> sizes -> tokens -> launch parameters. What is not
listed, and an empty entry, runs with the defaults beside its kernel.

FASTER: (device, op, dtype) -> (N, K) -> ranges of M, ends included, at each measured M of which
Triton was faster than torch by more than the spread. Elsewhere `s2kernels.backend` takes torch.
"""

# fmt: off

Launches = dict[tuple[int, ...], dict[int, dict[str, int]]]
Ranges = tuple[tuple[int, int], ...]

LAUNCH: dict[tuple[str, str, str], Launches] = {}

FASTER: dict[tuple[str, str, str], dict[tuple[int, int], Ranges]] = {}
