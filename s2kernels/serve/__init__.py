"""Many adapters on one model: grouped in one batch, or written into the weights, exactly."""

from s2kernels.serve.serving import Serving
from s2kernels.serve.store import NoRoom

__all__ = ["NoRoom", "Serving"]
