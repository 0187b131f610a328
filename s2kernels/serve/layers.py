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
        self._hooks: list[RemovableHandle] = _noting_shapes(model, self._local)

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
            *batch, width = x.shape
            if len(batch) != 2:
                shape = getattr(local, "shape", None)
                if shape is None or shape.numel() != x.numel() // width:
                    raise ValueError(
                        "a layer with adapters must get (rows, tokens, channels), or the model "
                        f"all of its tokens, got shape {tuple(x.shape)}"
                    )
                batch = shape
            groups = assignment.plan(*batch).groups(place)
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
            grouped(y, x.reshape(-1, width), pool, groups)
            return output

        return hook


def _noting_shapes(model: nn.Module, local: threading.local) -> list[RemovableHandle]:
    """Have local.shape be (rows, tokens) of what the model computes, from its begin to its end.

    Some models put the tokens of all rows in one dimension before a layer.
    """

    # No methods: whoever copies the model would copy what they belong to.
    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        first = next((x for x in inputs if isinstance(x, Tensor) and x.dim() > 1), None)
        local.shape = None if first is None else first.shape[:2]

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        local.shape = None

    return [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, always_call=True),
    ]
