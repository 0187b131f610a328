"""A linear layer with adapters: when its call runs as it was prepared."""

from typing import Any

import torch
from torch import Tensor

from s2kernels.peft.host.layer import AdapterLayer


class AdapterLinear(AdapterLayer):
    """A linear layer of either method."""

    def compute(self, x: Tensor, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        """What `forward` returns, by a call that `prepare` has made; the weight is written."""
        raise NotImplementedError

    def compute_mixed(self, x: Tensor, rows: Any, *args: Any, **kwargs: Any) -> Tensor:
        """What `forward` returns for a mixed batch."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the active adapters: (..., N) for x (..., K)."""
        if torch.compiler.is_compiling():
            return self.compute(x, self.prepare(), *args, **kwargs)
        keeper, call = self.keeper, self._call
        if keeper.is_ready(call):
            return self.compute(x, call, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        call, rows = self.prepared(), keeper.forwards.rows
        if rows is not None and not self.disable_adapters:
            return self.compute_mixed(x, rows, *args, **kwargs)
        if keeper.are_ready(call.written):
            return self.compute(x, call, *args, **kwargs)
        with keeper.forwards.lock:
            keeper.ensure_written(call.written)
            return self.compute(x, call, *args, **kwargs)
