"""Where the tests run: compiled where there is a GPU, else in Triton's interpreter on CPU."""

import functools
import os
import zlib

import pytest
import torch

# Both are read once, by triton's import and by cuBLAS's first call.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from numerics import DTYPES

try:
    from hypothesis import settings
except ImportError:  # a bare GPU machine: the files that need it are skipped
    pass
else:
    # An interpreted kernel is slow without being wrong, and a red test should stay red when run
    # again.
    settings.register_profile("s2kernels", deadline=None, derandomize=True)
    settings.load_profile("s2kernels")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`make test-fast` runs a quarter of the sets of parameters of each test, the first among them.

    Which ones depends on their names alone; the others are marked slow. So are tests that start
    processes (the fixture `ranks`).
    """
    begun = set()
    for item in items:
        test, parameters, _ = item.nodeid.partition("[")
        is_left_out = parameters and test in begun and zlib.crc32(item.nodeid.encode()) % 4
        if is_left_out or "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
        begun.add(test)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Toy operations are too small to share: threads of a busy machine only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _model_cards_from_one_template():
    """PEFT compiles the template in every save, which takes a tenth of the time of its tests."""
    try:
        import jinja2
    except ImportError:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        yield


@pytest.fixture(autouse=True)
def _reproducible():
    """Fixed seed, and NaN in every torch.empty, so that an output left unwritten is seen.

    Operations without a deterministic version only warn: the NaN are what this is for.
    """
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dtypes() -> list[torch.dtype]:
    """The dtypes of the kernels here."""
    return DTYPES


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    """Each of `dtypes` in turn."""
    return request.param
