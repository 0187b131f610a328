"""What was timed of a case, in visits, and what its entry in the JSON says of them.

A visit is some rounds with fresh models. A case is visited more than once in a run, minutes apart:
where its models lie in memory, and what else the machine is at, stay the same for a visit but not
much longer. What an entry says is of the rounds of all its visits in which the machine was quiet.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bench import timing

PARTS = ("forward", "backward", "optimizer")
FEWEST = 5  # quiet rounds; where there are less, all rounds count


@dataclass(frozen=True)
class Visit:
    """Seconds of the steps of some rounds.

    laps: of zeroing, forward, backward and update, by round.
    floor: of the floor's step, in the same rounds if paired, else in rounds right before.
    periodic: of work that is done every so many steps only, its share of one step.
    took: of all of the visit, making the models and warming up included.
    """

    laps: list[list[float]]
    floor: list[float]
    periodic: float
    paired: bool
    took: float

    @property
    def seconds(self) -> list[float]:
        return [sum(lap) + self.periodic for lap in self.laps]

    @property
    def ratios(self) -> list[float]:
        """To the floor's step in the same round if paired, else to the floor's median."""
        if self.paired:
            return timing.paired_ratios(self.seconds, self.floor)
        reference = statistics.median(self.floor)
        return [seconds / reference for seconds in self.seconds]


def of(entry: dict) -> list[Visit]:
    """The visits that `entry` holds; a copy holds none."""
    return [Visit(**visit) for visit in entry["extra_info"].get("visits", [])]


def with_visit(entry: dict, visit: Visit) -> dict:
    """`entry` with one more visit; to be summed up."""
    made = [*entry["extra_info"].get("visits", []), rounded(visit)]
    return entry | {"extra_info": entry["extra_info"] | {"visits": made}}


def rounded(visit: Visit) -> dict:
    """As the file has it: in whole nanoseconds."""
    short = {"laps": [[round(lap, 9) for lap in laps] for laps in visit.laps]}
    return asdict(visit) | short | {"floor": [round(seconds, 9) for seconds in visit.floor]}


def summed_up(entry: dict, limit: float) -> dict:
    """`entry` with its times as its visits have them, of rounds in which the machine was quiet.

    limit: seconds that a floor's step takes at the most while it is; inf: it always was.
    """
    made = of(entry)
    quiet = [is_quiet(visit, limit) for visit in made]
    found = sum(map(sum, quiet))
    if found < FEWEST:
        quiet = [[True] * len(visit.laps) for visit in made]
    chosen = list(zip(made, quiet, strict=True))

    def counted(of_visit: str) -> list[float]:
        return [
            value
            for visit, counts in chosen
            for value, count in zip(getattr(visit, of_visit), counts, strict=True)
            if count
        ]

    seconds = counted("seconds")
    zeroing, forward, backward, update = (
        statistics.median(of_part) for of_part in zip(*counted("laps"), strict=True)
    )
    parts = dict(zip(PARTS, (forward, backward, zeroing + update), strict=True))
    paired = all(visit.paired for visit in made)
    floor = counted("floor") if paired else [each for visit in made for each in visit.floor]
    times = {
        "ratio_to_floor": timing.quartiles(counted("ratios")),
        "floor_seconds": timing.quartiles(floor),
        "quiet_rounds": found,
        "seconds": parts | {"periodic": statistics.fmean(visit.periodic for visit in made)},
        "tokens_per_second": entry["params"]["tokens"] / statistics.median(seconds),
        "paired": paired,
    }
    return entry | {"stats": timing.stats(seconds), "extra_info": entry["extra_info"] | times}


def is_quiet(visit: Visit, limit: float) -> list[bool]:
    """Of each round, whether the machine was quiet: the floors beside it took `limit` at the most.

    Not the floor of the round itself: it is a part of the ratio, and to choose by it would leave
    out ratios that are small by chance.
    """
    if not visit.paired:
        return [True] * len(visit.laps)
    return [statistics.fmean(beside) <= limit for beside in neighbours(visit.floor)]


def neighbours(values: Sequence[float]) -> list[Sequence[float]]:
    """Of each value the one before and the one after, or what there is of them."""
    around = [(*values[max(0, n - 1) : n], *values[n + 1 : n + 2]) for n in range(len(values))]
    return [each or (value,) for each, value in zip(around, values, strict=True)]
