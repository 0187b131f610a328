"""Hooks that add the adapters of a batch to what the linear layers of a model computed."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from s2kernels import backend
from s2kernels.serve.batch import Assignment
from s2kernels.serve.content import Place


class GroupedLayers:
    """The layers of `model` that adapters train, and the pool of their rows.

    Which rows have which adapter is said for each thread on its own, by `assigned`; where nothing
    is said, the layers compute the base model.
    """

    def __init__(self, model: nn.Module, pool: Tensor) -> None:
        self._model, self._pool = model, pool
        self._local = threading.local()
        self._hooks: list[RemovableHandle] = []

    def attach(self, places: Mapping[Place, int]) -> None:
        """Have the layers at these places, by their numbers in the store, take part."""
        for (module, dim), place in places.items():
            hook = self._hook(place, dim)
            self._hooks.append(self._model.get_submodule(module).register_forward_hook(hook))

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def assign(self, assignment: Assignment | None) -> None:
        """For the forwards of this thread from now on."""
        self._local.assignment = assignment

    @property
    def assignment(self) -> Assignment | None:
        return getattr(self._local, "assignment", None)

    @contextmanager
    def assigned(self, assignment: Assignment) -> Iterator[None]:
        if self.assignment is not None:
            raise RuntimeError("this thread is within another batch")
        self.assign(assignment)
        try:
            yield
        finally:
            self.assign(None)

    def _hook(self, place: int, dim: str) -> Any:
        local, pool = self._local, self._pool
        ops = backend.select(pool)
        grouped = ops.grouped_in_ if dim == "in" else ops.grouped_out_

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            assignment = getattr(local, "assignment", None)
            if assignment is None:
                return None
            x = args[0]
            if x.dim() != 3:
                raise ValueError(f"x must be (rows, tokens, channels), got shape {tuple(x.shape)}")
            groups = assignment.plan(x.shape[0], x.shape[1]).groups(place)
            if groups is None:
                return None
            if output.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    "adapters are served without gradients: call the model under torch.no_grad()"
                )
            if output.dtype != pool.dtype or x.dtype != pool.dtype:
                raise TypeError(
                    f"adapters are served in {pool.dtype}, the dtype of the model, "
                    f"but a layer got {x.dtype} and gave {output.dtype}"
                )
            y = output.view(-1, output.shape[-1])
            grouped(y, x.reshape(-1, x.shape[-1]), pool, groups)
            return output

        return hook
