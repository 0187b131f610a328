"""Cases measured one after another into a record, until a deadline."""

import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from bench import measure, quiet, timing
from bench.cases import Case
from bench.estimate import Estimate
from bench.fresh import Setup
from bench.methods import METHODS, Unavailable
from bench.record import Record
from bench.rounds import Disturbed

REPEATS = 4  # of a case that the machine was slow for, in one run
PAUSE = 5.0  # seconds, after which it may be faster


@dataclass
class Run:
    """Every entry is written at once. No case is begun that would end after `deadline`.

    deadline: by time.perf_counter(); None for none.
    known: entries by their fullname, which a case that is equal but for its suite is a copy of;
    what is measured joins them.
    """

    record: Record
    setup: Setup
    deadline: float | None
    known: dict[str, dict]
    clock: Estimate = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Estimate(self.setup)

    def measure(self, todo: list[Case]) -> None:
        """Measures `todo` in order; says how many cases did not fit.

        A case that fails is noted and the next one begun, unless the GPU is lost to this process.
        One that does not return, because the process is killed, is noted too: the next run begins
        with the others.
        """
        left_out = 0
        with tqdm(todo, unit="case", disable=None if todo else True) as bar:
            for case in bar:
                bar.set_postfix_str(case.id)
                if (copy := equal(case, self.known)) is not None:
                    self.record.add(copy)
                elif not self._fits(case):
                    left_out += 1
                else:
                    self.record.add(not_finished(case))
                    entry = self._measure(case)
                    self.record.add(entry)
                    self.known[case.fullname] = entry
                    if is_failure(entry):
                        timing.synchronize(self.setup.device)  # raises again what broke the GPU
        if left_out:
            print(f"{left_out} cases did not fit into the budget; the same command goes on there")

    def repeat_disturbed(self, cases: Iterable[Case]) -> None:
        """Times again those of `cases` that the machine was slow for, in turn, worst first.

        Each at most REPEATS times, as long as the budget lasts; says how many are left. What is
        measured beside a faster floor takes the place of what there was, whatever its ratio.
        """
        by_name = {case.fullname: case for case in cases}
        tried: Counter[str] = Counter()

        def slow() -> list[tuple[dict, float]]:
            found = quiet.disturbed(self.record.entries.values())
            return [(entry, limit) for entry, limit in found if entry["fullname"] in by_name]

        def due() -> list[tuple[dict, float]]:
            return [
                (entry, limit)
                for entry, limit in slow()
                if tried[entry["fullname"]] < REPEATS and self._fits(by_name[entry["fullname"]])
            ]

        while again := due():
            # first what was tried least, in earlier runs too: one may have ended the process
            before, limit = min(again, key=lambda pair: pair[0]["extra_info"]["repeats"])
            name, extra = before["fullname"], before["extra_info"]
            tried[name] += 1
            before = before | {"extra_info": extra | {"repeats": extra["repeats"] + 1}}
            self.record.add(before)
            result = self._time_again(by_name[name], before, limit)
            told = f"{len(again)} beside a slow floor; {before['name']}: {in_short(before)}, again"
            tqdm.write(f"{told} {result}", file=sys.stdout)
        if left := len(slow()):
            print(f"{left} cases were timed beside a slow floor; without --again they are so again")

    def _time_again(self, case: Case, before: dict, limit: float) -> str:
        """What came of it, in words."""
        try:
            entry = measure.time_again(before, case, self.setup, limit)
        except Disturbed:
            time.sleep(PAUSE)
            return "slow"
        except Exception as error:
            traceback.print_exc()
            timing.synchronize(self.setup.device)  # raises again what broke the GPU
            return f"failed: {type(error).__name__}"
        if not entry["extra_info"]["paired"] or quiet.seconds(entry) > quiet.seconds(before):
            return f"{in_short(entry)}, not taken"
        self.record.add(entry)
        for other in list(self.record.entries.values()):
            if other["extra_info"].get("copy_of") == before["name"]:
                self.record.add(copy_for(other, entry))
        return in_short(entry)

    def _fits(self, case: Case) -> bool:
        """Whether it would end in time; what is unavailable takes none."""
        if self.deadline is None or not is_available(case, self.setup.device):
            return True
        return time.perf_counter() + self.clock.seconds(case) <= self.deadline

    def _measure(self, case: Case) -> dict:
        """The entry of a case, a failure if that is what came of it; prints it in short."""
        start = time.perf_counter()
        try:
            entry = measure.measure(case, self.setup)
        except Exception as error:
            traceback.print_exc()
            entry = failure(case, error)
        seconds = time.perf_counter() - start
        if entry["stats"] is not None:
            self.clock.took(case, seconds)
        tqdm.write(f"{case.id}: {in_short(entry)}, {seconds:.1f} s", file=sys.stdout)
        return entry


def equal(case: Case, known: dict[str, dict]) -> dict | None:
    """The entry of `case` as a copy of one in `known` that is equal but for its suite, if any."""
    params = case.params()
    for entry in known.values():
        if entry["params"] == params and not is_failure(entry):
            names = {"group": case.suite, "name": case.id, "fullname": case.fullname}
            return copy_for(names, entry)
    return None


def copy_for(names: dict, entry: dict) -> dict:
    """`entry` under the group, name and fullname of `names`."""
    named = {key: names[key] for key in ("group", "name", "fullname")}
    return entry | named | {"extra_info": entry["extra_info"] | {"copy_of": entry["name"]}}


def is_available(case: Case, device: torch.device) -> bool:
    try:
        METHODS[case.method].check(device, case.options)
    except Unavailable:
        return False
    return True


def in_short(entry: dict) -> str:
    extra = entry["extra_info"]
    if entry["stats"] is None:
        return extra["status"]
    return f"{extra['ratio_to_floor']['median']:.3f} x floor"


def failure(case: Case, error: Exception) -> dict:
    first_line = (str(error).splitlines() or [""])[0]
    return _failed(case, f"{type(error).__name__}: {first_line}")


def not_finished(case: Case) -> dict:
    """What the file says of a case while it is measured, and ever after if nothing follows."""
    return _failed(case, "not finished")


def is_failure(entry: dict) -> bool:
    return entry["extra_info"]["status"].startswith("failed")


def _failed(case: Case, why: str) -> dict:
    known = {"status": f"failed: {why}", "total_parameters": case.shape.parameters()}
    return measure.entry(case, None, known)
