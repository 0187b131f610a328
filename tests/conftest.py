"""Where the tests run: compiled where there is a GPU, else in Triton's interpreter on CPU."""

import os

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


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(min(torch.get_num_threads(), 2))


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
