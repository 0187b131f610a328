"""The training steps of results/<device>/steps.json, as figures and tables want them."""

import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from plots import style

# What is drawn of a step, by how its status begins.
MARKS = {"measured": "", "out of memory": "OOM", "unavailable": "n/a"}
MARKS_MEANING = "OOM: out of memory; n/a: not available there."
NOTE = "Times: ratio to the frozen floor of the same rounds × the floor's median at that size."
SIZES = ("layers", "vocab", "batch", "length", "dtype")  # of the steps of a shape
T, K = TypeVar("T"), TypeVar("K")
LINE = 160  # characters of a caption that the width of a figure has room for


@dataclass(frozen=True)
class Step:
    """One method's step in one setting. What was not measured is None."""

    suites: tuple[str, ...]
    shape: str
    layers: int
    of_layers: int  # of the whole model
    vocab: int
    of_vocab: int  # of the whole model
    batch: int
    length: int
    dtype: str
    method: str
    options: str  # those that are not the default, "" if all are
    share: float | None  # of all parameters that was to be trained
    status: str  # begins as a key of MARKS
    trained: int | None
    total: int
    ratio: dict | None  # median, q1, q3 of step / frozen floor, of the same round
    floor: float | None  # seconds of the floor of this size
    bytes: dict | None  # peak, first_step_peak and their parts

    @property
    def mark(self) -> str:
        """What is drawn in the place of a measurement, "" if there is one."""
        return next(mark for start, mark in MARKS.items() if self.status.startswith(start))

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def trained_percent(self) -> float:
        """Trained parameters as they are; what was asked for where the step did not run."""
        return 100 * (self.share if self.trained is None else self.trained / self.total)

    def milliseconds(self, quantile: str = "median") -> float | None:
        return None if self.ratio is None else self.ratio[quantile] * self.floor * 1e3

    def peak(self, unit: float) -> float | None:
        """In units of `unit` bytes."""
        return None if self.bytes is None else self.bytes["peak"] / unit

    def saved(self, unit: float) -> float | None:
        """In units of `unit` bytes; unknown under torch.compile, too."""
        saved = (self.bytes or {}).get("saved")
        return None if saved is None else saved / unit

    @property
    def model_name(self) -> str:
        """The shape and, where the model was cut, what of it was run."""
        return ", ".join([self.shape, *_cuts([self])])

    @property
    def model(self) -> tuple:
        """The model as it was run."""
        return self.shape, self.layers, self.vocab, self.dtype

    @property
    def size(self) -> tuple:
        """The model and the batch: what two methods must have in common to be compared."""
        return (*self.model, self.tokens, self.length, self.batch)


def read(document: dict, *suites: str) -> list[Step]:
    """The steps of some suites, or of all: small models first, methods in their order.

    Raises ValueError for a method that plots.style.METHODS does not have.
    """
    entries = document["benchmarks"]
    floors = {
        entry["params"]["floor"]: entry["stats"]["median"]
        for entry in entries
        if entry["params"]["method"] == "frozen" and entry["stats"] is not None
    }
    steps = [_step(entry, floors) for entry in entries]
    found = [step for step in steps if not suites or set(suites) & set(step.suites)]
    if unknown := {step.method for step in found} - set(style.METHODS):
        raise ValueError(f"methods must be those of plots.style.METHODS, got {sorted(unknown)}")
    order = list(style.METHODS).index
    return sorted(found, key=lambda s: (s.total, s.size, s.options, s.share or 0, order(s.method)))


def groups(all_: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """All by `key`, in the order in which the keys come."""
    found: dict[K, list[T]] = {}
    for each in all_:
        found.setdefault(key(each), []).append(each)
    return found


def series(document: dict, suite: str, *along: str) -> Iterator[tuple[str, list[Step]]]:
    """Yields name and steps of each figure of one suite. Only SIZES in `along` differ in a figure.

    A figure has the name of its shape and, where that has several, of the sizes that differ.
    """
    for shape, steps in groups(read(document, suite), lambda step: step.shape).items():
        sizes = [name for name in SIZES if name not in along]
        apart = [name for name in sizes if len({getattr(step, name) for step in steps}) > 1]
        figures: dict[str, list[Step]] = {}
        for step in steps:
            words = [f"{name}-{getattr(step, name)}" for name in apart]
            figures.setdefault("-".join([shape, *words]), []).append(step)
        yield from figures.items()


def byte_unit(steps: list[Step]) -> tuple[float, str]:
    """The unit that suits the peaks of these steps, and its name."""
    lowest = min((step.peak(1) for step in steps if step.bytes is not None), default=0)
    return (2**30, "GiB") if lowest >= 2**30 else (2**20, "MiB")


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
    marks = [MARKS_MEANING] if any(step.mark for step in steps) else []
    text = " ".join([f"{', '.join(words)}.", *notes, *marks])
    return f"{textwrap.fill(text, LINE)}\n{style.machine(document)}."


def _cuts(steps: list[Step]) -> list[str]:
    """How much of their layers and of their vocabulary models of one shape have, where cut."""
    cuts = []
    for name, what in (("layers", "layers"), ("vocab", "tokens of the vocabulary")):
        whole = getattr(steps[0], f"of_{name}")
        numbers = sorted({getattr(step, name) for step in steps})
        if numbers != [whole]:
            cuts.append(f"{'/'.join(f'{n:,}' for n in numbers)} of {whole:,} {what}")
    return cuts


def _step(entry: dict, floors: dict[str, float]) -> Step:
    params, extra = entry["params"], entry["extra_info"]
    status = extra["status"]
    if not status.startswith(tuple(MARKS)):
        raise ValueError(f"status of {entry['name']!r} must begin as {[*MARKS]}, got {status!r}")
    options = [name.replace("_", " ") for name, on in params["options"].items() if on is True]
    if (attention := params["options"]["attention"]) != "sdpa":
        options.append(f"{attention} attention")
    own = extra.get("floor_seconds", {}).get("median")
    names = ("shape", "layers", "of_layers", "vocab", "of_vocab", "batch", "length", "dtype")
    return Step(
        **{name: params[name] for name in (*names, "method", "share")},
        suites=tuple(params["suites"]),
        options=", ".join(options),
        status=status,
        trained=extra.get("trained_parameters"),
        total=extra["total_parameters"],
        ratio=extra.get("ratio_to_floor"),
        floor=floors.get(params["floor"], own),
        bytes=extra.get("bytes"),
    )
