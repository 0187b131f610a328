"""Settings of the pytest benchmarks: `pytest bench`, from the root of the repository.

With --results, <folder>/<device>/ops.json is written after every benchmark rather than at the end,
and those that it has already are left out, unless --again; with --budget-s none is begun later.
"""

import json
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.utils import safe_dumps

from bench import ceilings, report, timing
from bench.record import Record

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECORD = pytest.StashKey[Record]()
BEGAN = time.perf_counter()


def synchronized() -> float:
    """A clock that waits for the device first."""
    timing.synchronize(DEVICE)
    return time.perf_counter()


def pytest_addoption(parser):
    group = parser.getgroup("s2kernels")
    group.addoption("--results", type=Path, help="folder; its file is written step by step")
    group.addoption("--again", action="store_true", help="measure also what the file has")
    group.addoption("--budget-s", type=float, default=float("inf"), help="begin none later")


def pytest_configure(config):
    folder = config.getoption("--results")
    if folder is not None:
        machine = {"ceilings": ceilings.measure(DEVICE), "clocks": report.gpu_clocks(DEVICE)}
        path = folder / report.device_name(DEVICE) / "ops.json"
        config.stash[RECORD] = Record(path, DEVICE, machine)


def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=synchronized))
    if RECORD in config.stash:
        record = config.stash[RECORD]
        if config.getoption("--again"):
            for item in items:
                record.entries.pop(item.nodeid, None)
        known = record.entries
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
        items[:] = [item for item in items if item.nodeid not in known]


@pytest.fixture(autouse=True)
def _recorded(request, benchmark):
    config = request.config
    if time.perf_counter() - BEGAN > config.getoption("--budget-s"):
        pytest.skip("the budget is spent")
    yield
    if RECORD in config.stash and benchmark.stats is not None:
        # Parameters are any objects: through the encoder that pytest-benchmark has for them.
        config.stash[RECORD].add(json.loads(safe_dumps(benchmark.stats.as_dict())))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(report.machine_info(DEVICE))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE
