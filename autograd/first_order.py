"""What the backward of every Function here has in common: it runs once, and without autocast."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, without what only transforms of torch.func need: they look at every
    argument, which takes as long as a small operation.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose gradients have no graph: to differentiate them raises RuntimeError.

    It runs inside `ctx.holding`, a context or None, which the host has given in forward: inside,
    weights hold what the forward saw. Autocast is off, since the operands have the dtype of the
    forward already.
    """
    once = once_differentiable(backward)

    def guarded(ctx: Any, *dys: Tensor | None) -> Any:
        device = next(dy.device.type for dy in dys if dy is not None)
        if not torch.amp.is_autocast_available(device):  # the meta device has none
            return once(ctx, *dys)
        with torch.autocast(device, enabled=False):
            return once(ctx, *dys)

    @wraps(backward)
    def run(ctx: Any, *dys: Tensor | None) -> Any:
        # Nearly no step has autocast on in backward, or asks for a graph, and both guards take
        # longer than a small operation.
        plain = not (torch._C._is_any_autocast_enabled() or torch.is_grad_enabled())
        compute = backward if plain else guarded
        if ctx.holding is None:
            return compute(ctx, *dys)
        with ctx.holding:
            return compute(ctx, *dys)

    return run


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`; without a call into torch where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
