"""The training steps of results/<device>/steps.json, as figures and tables want them."""

import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from plots import floors, style

# What is drawn of a step, by how its status begins.
MARKS = {"measured": "", "out of memory": "OOM", "unavailable": "n/a", "failed": "failed"}
MARKS_MEANING = "OOM: out of memory; n/a: not available there; failed: not measured, by an error."
SIZES = ("layers", "vocab", "batch", "length", "dtype")  # of the steps of a shape
LINE = 160  # characters of a caption that the width of a figure has room for


@dataclass(frozen=True)
class Step:
    """One method's step in one setting. What was not measured, or not modelled, is None."""

    shape: str
    layers: int
    of_layers: int  # of the whole model
    vocab: int
    of_vocab: int  # of the whole model
    batch: int
    length: int
    dtype: str
    method: str
    options: str  # what is unlike the usual, "" if nothing is
    share: float | None  # of all parameters that was to be trained
    status: str  # begins as a key of MARKS
    trained: int | None
    total: int
    seconds: dict | None  # median, q1, q3 of a step; see `plots.floors`
    ratio: dict | None  # median, q1, q3 of step / frozen floor, of the same round
    bytes: dict | None  # peak, first_step_peak and their parts
    model: dict | None  # seconds, peak, saved; fits: None, or where it does not fit

    @property
    def mark(self) -> str:
        """What is drawn in the place of a measurement, "" if there is one."""
        return next(mark for start, mark in MARKS.items() if self.status.startswith(start))

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def milliseconds(self) -> float | None:
        """Of a step, measured."""
        return None if self.seconds is None else self.seconds["median"] * 1e3

    def modelled_milliseconds(self) -> float | None:
        return None if self.model is None else self.model["seconds"] * 1e3

    def peak(self, unit: float) -> float | None:
        """In units of `unit` bytes, measured."""
        return None if self.bytes is None else self.bytes["peak"] / unit

    def modelled_peak(self, unit: float) -> float | None:
        return None if self.model is None else self.model["peak"] / unit

    @property
    def model_name(self) -> str:
        """The shape and, where the model was cut, what of it was run."""
        return ", ".join([self.shape, *_cuts([self])])

    @property
    def cut(self) -> tuple:
        """The model as it was run."""
        return self.shape, self.layers, self.vocab, self.dtype

    @property
    def size(self) -> tuple:
        """The model and the batch."""
        return self.shape, self.layers, self.vocab, self.tokens, self.length, self.batch, self.dtype

    @property
    def setting(self) -> tuple:
        """What two methods must have in common to be compared."""
        return (*self.size, self.options, self.share or 0)


def read(document: dict, suite: str) -> list[Step]:
    """The steps of one suite, small models first, methods in their order.

    Raises ValueError for a method that is unknown here, and for a case that comes twice.
    """
    steps = [_step(*timed) for timed in _timed(document) if timed[0]["group"] == suite]
    if unknown := {step.method for step in steps} - set(style.METHODS):
        raise ValueError(f"methods must be those of plots.style.METHODS, got {sorted(unknown)}")
    seen = set()
    for step in steps:
        if (key := (step.setting, step.method)) in seen:
            raise ValueError(f"suite {suite!r} must have each case once, got twice {key}")
        seen.add(key)
    order = list(style.METHODS)
    return sorted(steps, key=lambda s: (s.total, s.setting, order.index(s.method)))


def references(document: dict) -> dict[tuple, Step]:
    """The steps of all suites at the usual share, by size, options and method: what a figure shows
    beside those of its own suite."""
    steps = (_step(*timed) for timed in _timed(document))
    return {(s.size, s.options, s.method): s for s in steps if s.share is None}


def groups(steps: Iterable[Step], key: Callable[[Step], object]) -> dict[object, list[Step]]:
    """The steps by `key`, in the order in which the keys come."""
    found: dict[object, list[Step]] = {}
    for step in steps:
        found.setdefault(key(step), []).append(step)
    return found


def by_shape(document: dict, *suites: str) -> Iterator[tuple[str, str, list[Step]]]:
    """Yields suite, model and its steps: the figures to be drawn."""
    for suite in suites:
        for shape, steps in groups(read(document, suite), lambda step: step.shape).items():
            yield suite, shape, steps


def series(document: dict, suite: str, *along: str) -> Iterator[tuple[str, list[Step]]]:
    """Yields name and steps of each figure of one suite whose lines run along some of SIZES only.

    A figure has the name of its shape and, where that has several, of the sizes that differ.
    """
    for _, shape, steps in by_shape(document, suite):
        sizes = [name for name in SIZES if name not in along]
        apart = [name for name in sizes if len({getattr(step, name) for step in steps}) > 1]
        figures: dict[str, list[Step]] = {}
        for step in steps:
            words = [f"{name}-{getattr(step, name)}" for name in apart]
            figures.setdefault("-".join([shape, *words]), []).append(step)
        yield from figures.items()


def byte_unit(steps: list[Step]) -> tuple[float, str]:
    """The unit that suits the peaks of these steps, and its name."""
    peaks = [step.peak(1) or 0 for step in steps] + [step.modelled_peak(1) or 0 for step in steps]
    return (2**30, "GiB") if max(peaks) >= 2**30 else (2**20, "MiB")


def caption(document: dict, steps: list[Step], *notes: str) -> str:
    """What all the steps of a figure have in common, notes, and what they ran on."""
    words = [*sorted({step.shape for step in steps}), *_cuts(steps)]
    words += sorted({step.dtype for step in steps})
    for name in ("length", "batch"):
        numbers = {getattr(step, name) for step in steps}
        if len(numbers) == 1:
            words.append(f"{name} {numbers.pop():,}")
    options = {step.options for step in steps}
    if len(options) == 1:
        words += filter(None, options)
    sentences = [f"{', '.join(words)}.", *notes]
    if any(step.mark for step in steps):
        sentences.append(MARKS_MEANING)
    return f"{textwrap.fill(' '.join(sentences), LINE)}\n{style.machine(document)}."


def _cuts(steps: list[Step]) -> list[str]:
    """How much of their layers and of their vocabulary models of one shape have, where cut."""
    cuts = []
    for name, what in (("layers", "layers"), ("vocab", "tokens of the vocabulary")):
        whole = getattr(steps[0], f"of_{name}")
        numbers = sorted({getattr(step, name) for step in steps})
        if numbers != [whole]:
            cuts.append(f"{'/'.join(f'{n:,}' for n in numbers)} of {whole:,} {what}")
    return cuts


def _timed(document: dict) -> Iterator[tuple[dict, dict | None]]:
    """Each entry with its seconds, for which the floors of all suites count."""
    benchmarks = document["benchmarks"]
    return zip(benchmarks, floors.steady_seconds(benchmarks), strict=True)


def _step(entry: dict, seconds: dict | None) -> Step:
    params, extra = entry["params"], entry["extra_info"]
    status = extra["status"]
    if not status.startswith(tuple(MARKS)):
        raise ValueError(f"status of {entry['name']!r} must begin as {[*MARKS]}, got {status!r}")
    return Step(
        **{name: params[name] for name in ("shape", "layers", "of_layers", "vocab", "of_vocab")},
        **{name: params[name] for name in ("batch", "length")},
        **{name: params[name] for name in ("dtype", "method", "share")},
        options=", ".join(_unusual(params["options"])),
        status=status,
        trained=extra.get("trained_parameters"),
        total=extra["total_parameters"],
        seconds=seconds,
        ratio=extra.get("ratio_to_floor"),
        bytes=extra.get("bytes"),
        model=extra.get("model"),
    )


def _unusual(options: dict) -> list[str]:
    """The switches that are on, and an attention other than SDPA."""
    switches = [name.replace("_", " ") for name, on in options.items() if on is True]
    attention = options["attention"]
    return switches if attention == "sdpa" else [*switches, f"{attention} attention"]
