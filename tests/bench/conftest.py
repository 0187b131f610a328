"""What all tests of the laboratory share."""

import pytest

from bench.measure import machine


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
