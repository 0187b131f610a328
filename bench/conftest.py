"""The harness is pytest-benchmark: `pytest bench`, from the root of the repository.

With --results FOLDER the file FOLDER/<device>/<suite>.json is written after every benchmark; the
suite of bench_ops.py is ops. Benchmarks that the file has from the same code and machine are left
out, so that an interrupted run goes on where it was stopped.
"""

import json
from pathlib import Path

import pytest
import torch
from pytest_benchmark.utils import safe_dumps

from bench.kernels import laps
from bench.measure import machine, timing
from bench.measure.results import Results
from bench.steps.cases import SUITES
from bench.steps.compare import overview

DEVICE = machine.default_device()
FILES = pytest.StashKey[dict[str, Results]]()


def pytest_addoption(parser):
    group = parser.getgroup("s2kernels")
    group.addoption("--results", type=Path, help="folder of files that are written step by step")
    group.addoption("--again", action="store_true", help="measure also what these files have")
    group.addoption(
        "--suite",
        choices=SUITES,
        help="which steps: all of this device, the core methods at one size, or toy models; "
        "default: full, with --benchmark-disable toy",
    )


def pytest_configure(config):
    if config.option.suite is None:
        config.option.suite = "toy" if config.option.benchmark_disable else "full"
    config.stash[FILES] = {}
    if DEVICE.type == "cpu":
        machine.keep_freed_memory()


def file_of(item: pytest.Item) -> Results | None:
    """The file that the result of `item` belongs to."""
    folder, files = item.config.getoption("--results"), item.config.stash[FILES]
    if folder is None:
        return None
    suite = item.path.stem.removeprefix("bench_")
    if suite not in files:
        path = folder / machine.device_name(DEVICE) / f"{suite}.json"
        files[suite] = Results(path, DEVICE)
    return files[suite]


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("benchmark") is None:
            item.add_marker(pytest.mark.benchmark(timer=timing.Clock(DEVICE)))
    if not config.getoption("--again"):
        known = [item for item in items if (file := file_of(item)) and file.has(item.nodeid)]
        config.hook.pytest_deselected(items=known)
        items[:] = [item for item in items if item not in known]
        if known:
            print(f"{len(known)} results are there already; --again measures them again")
    for file in dict.fromkeys(filter(None, map(file_of, items))):
        if file.path.stem == "ops":
            file.machine_info["ceilings"] = laps.ceilings(DEVICE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Writes down what a benchmark measured, or the status that says why it did not."""
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    done = call.when == "call" and not report.failed and benchmark and not benchmark.disabled
    if not done or (file := file_of(item)) is None:
        return report
    if benchmark.stats is not None and not report.skipped:
        # Parameters are any objects: through the encoder that pytest-benchmark has for them.
        file.add(json.loads(safe_dumps(benchmark.stats.as_dict())))
    elif "status" in benchmark.extra_info:
        names = ("group", "name", "fullname", "params", "extra_info")
        file.add({name: getattr(benchmark, name) for name in names} | {"stats": None})
    return report


def pytest_sessionfinish(session, exitstatus):
    """To have all results already is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash[FILES]:
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter, config):
    for file in config.stash[FILES].values():
        terminalreporter.write_line(overview(file.entries))
        terminalreporter.write_line(f"{len(file.entries)} results in {file.path}")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(machine.machine_info(DEVICE))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE
