"""Settings of the pytest benchmarks: `pytest bench`, from the root of the repository."""

import time

import pytest
import torch

from bench import report, timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronized() -> float:
    """A clock that waits for the device first."""
    timing.synchronize(DEVICE)
    return time.perf_counter()


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=synchronized))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(report.machine_info(DEVICE))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE
