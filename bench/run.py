"""Cases measured one after another into a record, until a deadline."""

import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

import torch
from tqdm import tqdm

from bench import measure, quiet, report, timing, visits
from bench.cases import Case
from bench.estimate import Estimate
from bench.fresh import Setup
from bench.methods import METHODS, Unavailable
from bench.record import Record
from bench.rounds import Disturbed

VISITS = 6  # to a case in one run, after the first
PAUSE = 5.0  # seconds, after which a machine that is slow may be faster


@dataclass(frozen=True)
class Goal:
    """What is to be known of a case."""

    visits: int = 1
    quiet_rounds: int = 10
    error: float = 0.005  # standard error of the median ratio, as a share of it

    def reached(self, entry: dict) -> bool:
        extra = entry["extra_info"]
        return (
            len(extra["visits"]) >= self.visits
            and extra["quiet_rounds"] >= self.quiet_rounds
            and timing.standard_error(extra["ratio_to_floor"]["data"]) <= self.error
        )


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

    def visit(self, cases: Iterable[Case], goal: Goal) -> None:
        """Visits `cases` again, in turn, until `goal` is reached of each of them.

        Each at most VISITS times, as long as the budget lasts; says how many are left.
        """
        by_name = {case.fullname: case for case in cases}
        tried: Counter[str] = Counter()
        self.sum_up()

        def left() -> list[dict]:
            return [
                entry
                for name, entry in self.record.entries.items()
                if name in by_name and may_be_visited(entry) and not goal.reached(entry)
            ]

        def due() -> list[dict]:
            return [
                entry
                for entry in left()
                if tried[entry["fullname"]] < VISITS and self._has(visits.of(entry)[-1].took)
            ]

        with tqdm(unit="visit", disable=None if left() else True) as bar:
            while again := due():
                # first what was visited least, in earlier runs too: one may have ended the process
                before = min(again, key=lambda entry: attempts(entry["extra_info"]))
                tried[before["fullname"]] += 1
                bar.set_postfix_str(f"{len(again)} cases to go, {before['name']}")
                result = self._visit(by_name[before["fullname"]], before)
                tqdm.write(f"{before['name']}: {in_short(before)}, {result}", file=sys.stdout)
                bar.update()
        if number := len(left()):
            print(
                f"{number} cases are not known well enough; without --again they are visited again"
            )

    def _visit(self, case: Case, before: dict) -> str:
        """What came of it, in words."""
        extra = before["extra_info"]
        given_up = {"given_up": extra.get("given_up", 0) + 1}
        # What the file says if the visit ends the process.
        self.record.add(before | {"extra_info": extra | given_up})
        limit = quiet.limits(self.record.entries.values()).get(quiet.floor_of(before), inf)
        try:
            visit = measure.visit_again(case, self.setup, limit)
        except Disturbed:
            time.sleep(PAUSE)
            return "slow"
        except Exception as error:
            traceback.print_exc()
            timing.synchronize(self.setup.device)  # raises again what broke the GPU
            return f"failed: {type(error).__name__}"
        if not visit.paired:
            return "no longer fits beside its floor"
        self.record.add(visits.with_visit(before, visit))
        self.sum_up()
        return in_short(self.record.entries[case.fullname])

    def sum_up(self) -> None:
        """Has every entry say what its quiet rounds do, and every copy what its original does."""
        found = self.record.entries
        limits = quiet.limits(found.values())
        found |= {
            name: visits.summed_up(entry, limits.get(quiet.floor_of(entry), inf))
            for name, entry in found.items()
            if visits.of(entry)
        }
        originals = {entry["name"]: entry for entry in found.values()}
        self.record.add(
            *(
                copy_for(entry, originals[original])
                for entry in found.values()
                if (original := entry["extra_info"].get("copy_of")) in originals
            )
        )

    def count_launches(self, cases: Iterable[Case]) -> None:
        """CUDA kernels of a step of each of `cases` that was measured. After all times: a process
        that has been profiled may be slower for good."""
        if self.setup.device.type != "cuda":
            return
        for case in cases:
            entry = self.record.entries.get(case.fullname)
            if entry is None or not lacks_launches(entry) or not self._fits(case):
                continue
            number = measure.launches(case, self.setup)
            self.record.add(entry | {"extra_info": entry["extra_info"] | {"launches": number}})
        self.sum_up()

    def _fits(self, case: Case) -> bool:
        """Whether it would end in time; what is unavailable takes none."""
        return not is_available(case, self.setup.device) or self._has(self.clock.seconds(case))

    def _has(self, seconds: float) -> bool:
        """Whether so many are left."""
        return self.deadline is None or time.perf_counter() + seconds <= self.deadline

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
    """The entry of `case` as a copy of one in `known` that is equal but for its suite, if any.

    Not of one that other code was measured for, that failed, or that lacked a package: to look for
    this once more takes no time.
    """
    params = case.params()
    for entry in known.values():
        if entry["params"] != params or is_failure(entry) or is_unavailable(entry):
            continue
        if is_of_this_code(entry):
            names = {"group": case.suite, "name": case.id, "fullname": case.fullname}
            return copy_for(names, entry)
    return None


def copy_for(names: dict, entry: dict) -> dict:
    """`entry`, or what it is a copy of, under the group, name and fullname of `names`."""
    named = {key: names[key] for key in ("group", "name", "fullname")}
    extra = {key: value for key, value in entry["extra_info"].items() if key != "visits"}
    return entry | named | {"extra_info": {"copy_of": entry["name"]} | extra}


def may_be_visited(entry: dict) -> bool:
    return quiet.may_be_visited(entry) and is_of_this_code(entry)


def is_of_this_code(entry: dict) -> bool:
    return entry["extra_info"].get("source") == report.source_hash()


def attempts(extra: dict) -> int:
    """How often the case of this extra_info was visited or was begun to be."""
    return len(extra["visits"]) + extra.get("given_up", 0)


def lacks_launches(entry: dict) -> bool:
    """Whether they can be counted: not of a copy, nor of a compiled model, which takes minutes."""
    extra = entry["extra_info"]
    counted = extra["status"] == "measured" and "copy_of" not in extra
    return counted and extra["launches"] is None and not entry["params"]["options"]["compile"]


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


def is_unavailable(entry: dict) -> bool:
    return entry["extra_info"]["status"].startswith("unavailable")


def _failed(case: Case, why: str) -> dict:
    known = {"status": f"failed: {why}", "total_parameters": case.shape.parameters()}
    return measure.entry(case, None, known)
