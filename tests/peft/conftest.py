"""What tests of several parts of the tuners share."""

import pytest
from fused_models import count_calls

from s2kernels import backend


@pytest.fixture
def joined_as_on_a_gpu(monkeypatch):
    """Products are joined, wherever the tests run."""
    monkeypatch.setattr(backend, "prefers_joined", lambda weight: True)


@pytest.fixture
def calls(monkeypatch):
    """How often each of the fused Functions was asked for."""
    return count_calls(monkeypatch)
