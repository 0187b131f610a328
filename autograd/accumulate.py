"""Gradients that a backward adds into .grad itself, where a parameter's owner asks for it.

autograd lets a Function return d_delta, a tensor of its own, and then adds that to `delta.grad`:
a temporary and a launch for each delta. An owner, an optimizer that holds all its parameters in one
buffer (`s2kernels.flat`), may have the kernel of d_delta add into a buffer of gradients instead, or
do its step there and then (`s2kernels.update`). The Function then returns None for the delta.
"""

import weakref
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from s2kernels.update import Update, WeightSlice


class Use:
    """A forward that has read a delta, and whose backward has not run. It lives as its graph."""

    __slots__ = ("__weakref__",)


class GradientOwner(Protocol):
    """Who says where gradients go."""

    # whether a step is done in the backward, which wants to know of all forwards before it
    steps_in_backward: bool

    def begin_use(self, parameter: Tensor) -> Use | None:
        """A forward reads the parameter. Raises RuntimeError in a backward that has updated it."""
        ...

    def take_slot(self, parameter: Tensor, use: Use | None) -> Tensor | Update | None:
        """A tensor like the parameter to add its gradient to, which from then on is
        `parameter.grad`: zero if there was no gradient. Or a step that uses its gradient up. None
        where a foreign one is in its place, and where the gradient is to be an ordinary one.

        use: what `begin_use` gave in the forward. Raises RuntimeError, before anything changes,
        for a step that would not be that of the whole gradient.
        """
        ...


# a delta, its owner, and the use of its forward: None where nothing is stepped in the backward
Owned = tuple[Tensor, GradientOwner, Use | None]


class WeightHolder(Protocol):
    """What a backward runs inside of: there, weights hold what its forward saw."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exc: Any) -> Any: ...

    def writing(self, delta: Tensor) -> AbstractContextManager[WeightSlice | None]:
        """Within, the delta and what is given, its slice of a weight that holds it, are written
        together; None if no weight does.
        """
        ...


# id of a parameter -> weak references to it and to its owner. Not an attribute of the parameter,
# which would be pickled with the model.
_owners: dict[int, tuple[weakref.ref, weakref.ref]] = {}


def own_gradient(parameter: Tensor, owner: GradientOwner) -> None:
    """From now on, and while `owner` lives, backward adds to what it gives for `parameter`.

    A parameter has one owner: the last one that asked.
    """
    key = id(parameter)
    gone = weakref.ref(parameter, lambda _: _owners.pop(key, None))
    _owners[key] = gone, weakref.ref(owner)


def owner_of(delta: Tensor | None) -> Owned | None:
    """delta and the owner of its gradient, or None where it has none: for a Function's ctx.

    A saved tensor is not always the parameter that was saved: under non-reentrant checkpointing and
    other hooks on saved tensors it is a copy, which has no owner.
    """
    if delta is None or torch.compiler.is_compiling() or not _owners:
        return None  # a traced backward returns all of its gradients
    entry = _owners.get(id(delta))
    if entry is None or entry[0]() is not delta:
        return None
    owner = entry[1]()
    if owner is None:
        return None
    return delta, owner, owner.begin_use(delta) if owner.steps_in_backward else None  # type: ignore[return-value]


def check_unscaled(dy: Tensor) -> None:
    """Raises TypeError for a gradient of fp16, which somebody scaled and a step cannot unscale."""
    if dy.dtype == torch.float16:
        raise TypeError(
            "step_in_backward must not train in float16, whose gradients need a GradScaler: use "
            "bfloat16"
        )


def is_stepped(owned: Owned | None) -> bool:
    """Whether the backward may step the delta, and so wants to write into its weight."""
    return owned is not None and owned[2] is not None


def slot_of(node: Any, owned: Owned | None) -> Tensor | Update | None:
    """What `slice_grad` is to take as its `out`, there and then; None if the backward of `node` is
    to return d_delta.

    node: the ctx of the Function; owned: what `owner_of` gave in its forward. None also for a delta
    that has hooks, which want to see its gradient, and where the engine would not add it to .grad:
    in `torch.autograd.grad`, and in a `backward` whose `inputs` leave the delta out.
    """
    if owned is None:
        return None
    delta, owner, use = owned
    if delta._backward_hooks or delta._post_accumulate_grad_hooks:  # type: ignore[attr-defined]
        return None
    return owner.take_slot(delta, use) if _is_accumulated(node, delta) else None


def _is_accumulated(node: Any, parameter: Tensor) -> bool:
    """Whether the backward that runs adds a gradient of `parameter` to its .grad."""
    for following, _ in node.next_functions:
        if getattr(following, "variable", None) is parameter:
            try:
                return torch._C._will_engine_execute_node(following)  # type: ignore[attr-defined]
            except RuntimeError:  # torch.autograd.grad wants to be given the gradient of this one
                return False
    return False  # it is no leaf
