"""What all tests of the laboratory share."""

import pytest
import torch

from bench.measure import machine


@pytest.fixture(scope="package", autouse=True)
def _one_thread(_threads):
    """Toy operations are too small to share: threads of a busy machine only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_pytest(monkeypatch, capfd):
    """Runs `pytest` with these arguments from the root; returns the exit status and its output.

    In this process, whose imports are done; tests/bench/test_gpu_sh.py starts whole commands.
    """

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(machine.ROOT)
        monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)
        quiet = ["-q", "--disable-warnings", "--benchmark-quiet", "--capture=no"]
        without = [f"-pno:{plugin}" for plugin in ("cacheprovider", "faulthandler", "logging")]
        status = pytest.main([*quiet, *without, *arguments])
        return int(status), capfd.readouterr().out

    return run
