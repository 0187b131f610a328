"""Cases of the laboratory at toy size, and entries as if they had been measured."""

from bench import measure, rounds
from bench.cases import Case
from bench.shapes import TABLE

CEILINGS = {"gemm_flops": {"float32": 1e11, "bfloat16": 1e11}, "copy_bytes_per_second": 1e10}


def toy_case(method: str, **other) -> Case:
    return Case(
        **{"suite": "figure5", "shape": TABLE["toy"], "batch": 2, "length": 8}
        | {"dtype": "float32", "method": method}
        | other
    )


def fake_entry(case: Case, ratio: float = 1.2, floor: float = 0.1, **extra) -> dict:
    data = [ratio * 0.99, ratio, ratio * 1.01]
    parts = dict.fromkeys((*rounds.PARTS, "periodic"), 0.1)
    times = rounds.Times([0.1, 0.11, 0.12], [floor] * 3, data, parts, True)
    sizes = dict.fromkeys(("weights", "gradients", "optimizer", "temporaries", "unseen"), 0)
    sizes |= {"saved": 1000, "peak": 10_000, "first_step_peak": 9_000}
    known = {"status": "measured", "trained_parameters": 7, "bytes": sizes, "ops": 9, "model": None}
    return measure.entry(case, times, known | extra)


def measure_at_once(monkeypatch) -> list[str]:
    """Makes measuring take no time; returns the list in which the ids of measured cases appear."""
    done: list[str] = []

    def measured(case, setup):
        done.append(case.id)
        return fake_entry(case)

    monkeypatch.setattr(measure, "measure", measured)
    return done
