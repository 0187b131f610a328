"""Gradients that a backward adds into .grad itself, where a parameter's owner asks for it.

autograd lets a Function return d_delta, a tensor of its own, and then adds that to `delta.grad`:
a temporary and a launch for each delta. An owner, an optimizer that holds the gradients of all its
parameters in one buffer (`s2kernels.flat`), may have the kernel of d_delta add into that buffer
instead, or update its moments (`s2kernels.moments`). The Function then returns None for the delta.
"""

import weakref
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from s2kernels.moments import Moments


class GradientOwner(Protocol):
    """Who says where gradients are added up."""

    def take_slot(self, parameter: Tensor) -> Tensor | Moments | None:
        """A tensor like the parameter to add its gradient to, which from then on is
        `parameter.grad`: zero if there was no gradient. Or moments that use its gradient up. None
        where a foreign one is in its place, and where the gradient is to be an ordinary one.
        """
        ...


# Parameter -> weak reference to its owner. Not an attribute of the parameter, which would be
# pickled with the model.
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()


def own_gradient(parameter: Tensor, owner: GradientOwner) -> None:
    """From now on, and while `owner` lives, backward adds to what it gives for `parameter`.

    A parameter has one owner: the last one that asked.
    """
    _owners[parameter] = weakref.ref(owner)


def with_owner(delta: Tensor | None) -> Tensor | None:
    """delta, if its gradient has an owner, else None: for a Function's ctx.

    A saved tensor is not always the parameter that was saved: under non-reentrant checkpointing and
    other hooks on saved tensors it is a copy, which has no owner.
    """
    if delta is None or torch.compiler.is_compiling():
        return None  # a traced backward returns all of its gradients
    return delta if delta in _owners else None


def slot_of(delta: Tensor) -> Tensor | Moments | None:
    """What `slice_grad` is to take as its `out`, there and then; None if a backward is to return
    d_delta.

    To be called in a backward. None also for a delta that has hooks, which want to see its
    gradient, and where the engine would not add it to .grad: in `torch.autograd.grad`, and in a
    `backward` whose `inputs` leave the delta out.
    """
    if torch.compiler.is_compiling():
        return None
    reference = _owners.get(delta)
    owner = None if reference is None else reference()
    if owner is None or delta._backward_hooks or delta._post_accumulate_grad_hooks:  # type: ignore[attr-defined]
        return None
    return owner.take_slot(delta) if _is_accumulated(delta) else None


def _is_accumulated(parameter: Tensor) -> bool:
    """Whether the backward that runs adds a gradient of `parameter` to its .grad."""
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)  # type: ignore[attr-defined]
    except RuntimeError:  # torch.autograd.grad wants to be given the gradient of this one
        return False
