"""What tests of serving share."""

import pytest
from served_models import DIMS, llama, random_slices


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def adapters(request, model):
    """An adapter for each of the NAMES of a file."""
    names = request.module.NAMES
    return {name: random_slices(model, seed, list(DIMS)) for seed, name in enumerate(names)}
