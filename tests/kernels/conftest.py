"""What tests of several kernels share."""

import pytest


@pytest.fixture(params=["in", "out"])
def dim(request):
    """The dimension of the slice."""
    return request.param


@pytest.fixture(params=["run", "any", "compact"])
def kind(request):
    """Of the index, as `layouts.make_index` and `layouts.slice_operands` take it."""
    return request.param


@pytest.fixture
def grids_of(monkeypatch):
    """Watches a kernel of a module by its name; returns the grids that it is launched with."""

    def watch(module, name):
        grids, kernel = [], getattr(module, name)

        class Spy:
            def __getitem__(self, grid):
                grids.append(grid)
                return kernel[grid]

        monkeypatch.setattr(module, name, Spy())
        return grids

    return watch
