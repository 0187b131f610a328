"""What the package has by its own name."""

import subprocess
import sys

import pytest

import s2kernels


def test_names():
    from s2kernels.captured_step import capture
    from s2kernels.fast_ops import use_fast_ops

    assert s2kernels.capture is capture and s2kernels.use_fast_ops is use_fast_ops
    with pytest.raises(AttributeError, match="'s2kernels' has no attribute 'cature'"):
        s2kernels.cature  # noqa: B018


def test_import_is_light():
    """The command line answers --help without waiting for torch."""
    code = "import sys, s2kernels; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
