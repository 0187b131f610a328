"""Two processes on the CPU, started once for all tests here."""

import pytest
from two_processes import Ranks


@pytest.fixture(scope="session")
def ranks():
    started = Ranks()
    yield started
    started.close()
