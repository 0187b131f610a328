"""Cases of the laboratory at toy size, and entries as if they had been measured."""

from bench import measure, report
from bench.cases import Case
from bench.steps.model_shapes import TABLE
from bench.visits import Visit

CEILINGS = {"gemm_flops": {"float32": 1e11, "bfloat16": 1e11}, "copy_bytes_per_second": 1e10}


def toy_case(method: str, **other) -> Case:
    return Case(
        **{"suite": "figure5", "shape": TABLE["toy"], "batch": 2, "length": 8}
        | {"dtype": "float32", "method": method}
        | other
    )


def a_visit(ratio: float = 1.2, floor: float = 0.1, *, paired: bool = True) -> Visit:
    """Three rounds, 2 % apart, in which every part of a step takes a quarter of it."""
    laps = [[floor * ratio * spread / 4] * 4 for spread in (0.99, 1.0, 1.01)]
    return Visit(laps, [floor] * 3, periodic=0.0, paired=paired, took=1.0)


def fake_entry(case: Case, ratio: float = 1.2, floor: float = 0.1, **extra) -> dict:
    visit = a_visit(ratio, floor)
    sizes = dict.fromkeys(("weights", "gradients", "optimizer", "temporaries", "unseen"), 0)
    sizes |= {"saved": 1000, "peak": 10_000, "first_step_peak": 9_000}
    known = {"status": "measured", "trained_parameters": 7, "bytes": sizes, "ops": 9, "model": None}
    known |= {"source": report.source_hash(), "launches": None}
    return measure.entry(case, visit, known | extra)


def measure_at_once(monkeypatch) -> list[str]:
    """Makes measuring take no time; returns the list in which the ids of measured cases appear."""
    done: list[str] = []

    def measured(case, setup):
        done.append(case.id)
        return fake_entry(case)

    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(measure, "visit_again", lambda case, setup, limit: a_visit())
    return done
