"""When entries are replaced, and how many of them: numbers alone."""

import math
from dataclasses import dataclass

from s2kernels.autograd.checks import check_choice

DECAYS = ("linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The schedule of SpIEL. Steps are those of the optimizer, counted from 1.

    total_steps         of the whole training
    reselection_steps   S: a reselection follows every S steps
    accumulation_steps  g < S: gradients are watched for g steps before the first reselection, which
                        is after step g, and for g + 1 steps before each later one: during steps
                        nS to nS + g
    initial_rate        share of a layer's entries that a reselection replaces, at step 0
    final_rate          that share at the end of the training
    decay               how it goes from one to the other: "linear" or "cosine"

    With decay="linear" the first reselection replaces all entries, which were drawn at random.

    Raises ValueError for values out of range.
    """

    total_steps: int
    reselection_steps: int = 20
    accumulation_steps: int = 5
    initial_rate: float = 0.2
    final_rate: float = 0.0
    decay: str = "linear"

    def __post_init__(self) -> None:
        check_choice("decay", self.decay, DECAYS)
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        if not 1 <= self.accumulation_steps < self.reselection_steps:
            raise ValueError(
                "accumulation_steps must be at least 1 and less than reselection_steps, "
                f"got {self.accumulation_steps} and {self.reselection_steps}"
            )
        for name in ("initial_rate", "final_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def watches(self, step: int) -> bool:
        """Whether the gradients of this step count for the next reselection."""
        return step % self.reselection_steps <= self.accumulation_steps

    def reselects(self, step: int) -> bool:
        """Whether a reselection follows this step."""
        return step % self.reselection_steps == self.accumulation_steps

    def rate(self, step: int) -> float:
        """The share of entries that a reselection after this step replaces."""
        if self.decay == "linear" and step == self.accumulation_steps:
            return 1.0
        done = min(step / self.total_steps, 1.0)
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final_rate + (self.initial_rate - self.final_rate) * left

    def count(self, step: int, num_entries: int) -> int:
        """How many of a layer's entries a reselection after this step replaces, rounded down."""
        return math.floor(self.rate(step) * num_entries + 1e-9)  # 0.29 * 100 is 28.999999999999996
