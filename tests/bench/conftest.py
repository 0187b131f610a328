"""What all tests of the laboratory share."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _one_thread(_threads):
    """Toy operations are too small to share: threads of a busy machine only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
