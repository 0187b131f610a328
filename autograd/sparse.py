"""A linear layer of which scattered entries of the weight are trained (SpIEL).

With W = W0 + scatter(delta, index):

    y = x Wᵀ + b        dx = dy W        d_delta[e] = sum over m of dy[m, row_e] x[m, col_e]

It saves x and nothing else of the size of an activation or of the weight.

mode="inplace": the entries lie in the dense weight, so y and dx are one dense GEMM each.
mode="additive": delta is scattered into copies of the weight's panels, see
`s2kernels.autograd.panels`, in forward and again in backward. One of them is in memory at a time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from s2kernels import backend
from s2kernels.autograd.checks import (
    MODES,
    check_choice,
    check_device,
    check_floating,
    check_list,
    check_shape,
    check_weight,
    version_of,
)
from s2kernels.autograd.first_order import apply, cast, first_order
from s2kernels.autograd.linear import as_matrix, in_compute_dtype
from s2kernels.autograd.panels import Panels, Weight, linear_by_panels, linear_dx_by_panels
from s2kernels.plan import TilePlan, index_dtype
from s2kernels.reference import like_tokens

Observer = Callable[[Tensor, Tensor], None]

# index tensor -> (version, shape) for which its content was found good, as in checks.check_index.
_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def sparse_linear(
    x: Tensor,
    weight: Weight,
    delta: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    plan: TilePlan | None = None,
    mode: str = "inplace",
    impl: str | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Linear layer with trained entries: y = x (W0 + scatter(delta, index))ᵀ + bias.

    x:       (..., K), any number of tokens, none included
    weight:  (N, K), frozen, in the dtype of x (autocast casts both). In additive mode also
             `Panels` of any floating dtype, which are cast to that of x, once delta is added.
    delta:   (k,), zero at the start, fp32 by default
    index:   (k,) flat positions row * K + column, ascending, without repeats; contiguous, int32
             where N * K < 2**31, else int64
    bias:    (N,), frozen or trained
    plan:    `tile_plan(index, (N, K))`, made once for an index; without it, backward makes one
    mode:    "inplace": `weight` holds W0 + delta at its entries, in forward and in backward: the
             caller has written them (`sparse_write`, one launch for a whole model).
             "additive": it holds W0.
    impl:    "triton", "torch", or None to let `s2kernels.backend` decide
    observe: called in backward with dy (M, N) and x (M, K), which it must not change: what a growth
             phase wants to know about other entries, without computing anything twice

    Returns y (..., N) in x.dtype. Gradients: x, delta (in delta.dtype), bias.

    Raises TypeError or ValueError for a wrong dtype, shape, device, mode, index or plan. The
    content of an index is looked at once for each of its versions.
    """
    check_choice("mode", mode, MODES)
    if mode == "inplace" and not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor for mode='inplace', got {type(weight).__name__}")
    _check_weight(weight, x)
    check_floating(delta=delta, bias=bias)
    check_device(x.device, delta=delta, bias=bias)
    shape = (weight.shape[0], weight.shape[1])
    num = check_entries("index", index, shape)
    check_device(x.device, index=index)
    check_shape("delta", delta, num, why="one value for each entry of index")
    if bias is not None:
        check_shape("bias", bias, shape[0], why="out_features of weight")
    if plan is not None and (plan.shape != shape or len(plan.order) != num):
        raise ValueError(
            f"plan must be of {num} entries of a weight {shape}, "
            f"got one of {len(plan.order)} entries of {plan.shape}"
        )
    return linear(x, weight, delta, index, bias, mode, plan, None, impl, observe)


def linear(
    x: Tensor,
    weight: Weight,
    delta: Tensor,
    index: Tensor,
    bias: Tensor | None,
    mode: str,
    plan: TilePlan | None = None,
    holding: AbstractContextManager | None = None,
    impl: str | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """`sparse_linear` for a caller that has checked its arguments once and for all, as a host has.

    The backward runs inside `holding`: there the host writes the entries again, if something has
    restored the weight since the forward (a disabled adapter, a state_dict).
    """
    dense = isinstance(weight, Tensor)
    return apply(
        SparseLinearFunction,
        x,
        weight if dense else None,
        None if dense else weight,
        bias,
        delta,
        index,
        plan,
        mode,
        holding,
        impl,
        observe,
    )


class SparseLinearFunction(torch.autograd.Function):
    """y (..., N) from x (..., K); see `sparse_linear`. weight is a tensor, or else None."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        panels,
        bias,
        delta,
        index,
        plan,
        mode,
        holding,
        impl,
        observe,
    ):
        x = in_compute_dtype(x)
        tokens = as_matrix(x)
        ops = backend.select(x, impl)
        bias = None if bias is None else cast(bias, x.dtype)
        if mode == "additive":
            y = linear_by_panels(ops, tokens, panels or weight, bias, delta, index)
            y = like_tokens(y, x.shape)
        else:
            y = ops.linear(x, cast(weight, x.dtype), bias)

        ctx.needs_dx, _, _, ctx.needs_dbias, ctx.needs_delta = ctx.needs_input_grad[:5]
        # delta is saved in inplace mode too: a step of the optimizer between forward and backward
        # changes what dx ought to be, and autograd notices it by the version of a saved tensor.
        # So it does for an index that a selection has changed.
        ctx.save_for_backward(
            tokens if ctx.needs_delta or observe is not None else None,
            weight if ctx.needs_dx else None,
            delta,
            index,
        )
        ctx.panels, ctx.plan, ctx.mode, ctx.impl = panels, plan, mode, impl
        ctx.holding, ctx.observe = holding if ctx.needs_dx else None, observe
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x, weight, delta, index = ctx.saved_tensors
        shape, dy = dy.shape, as_matrix(dy)
        ops = backend.select(dy, ctx.impl)
        dx = dbias = d_delta = None
        if ctx.needs_dx:
            if ctx.mode == "additive":
                dx = linear_dx_by_panels(ops, dy, ctx.panels or weight, delta, index)
            else:
                dx = ops.linear_dx(dy, cast(weight, dy.dtype))
        if ctx.needs_delta:
            d_delta = cast(ops.sparse_grad(dy, x, index, ctx.plan), delta.dtype)
        if ctx.needs_dbias:
            dbias = dy.sum(0)
        if ctx.observe is not None:
            ctx.observe(dy, x)
        dx = None if dx is None else dx.view(*shape[:-1], dx.shape[-1])
        return dx, None, None, dbias, d_delta, None, None, None, None, None, None


def check_entries(name: str, index: Tensor, shape: tuple[int, int]) -> int:
    """Checks flat positions in a weight of that shape (N, K); returns how many.

    Raises TypeError for anything but a tensor of `index_dtype(shape)`; ValueError where it is
    empty, not one-dimensional, not contiguous, not ascending, repeats a position, or holds one
    outside [0, N * K).
    """
    size = shape[0] * shape[1]
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(index).__name__}")
    check_list(name, index, index_dtype(shape))
    if torch.compiler.is_compiling() or index.is_meta or isinstance(index, FakeTensor):
        return index.numel()
    if _checked.get(index) != (version_of(index), shape):
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < 0 or high >= size:
            raise ValueError(f"{name} must lie in [0, {size}), got values from {low} to {high}")
        if not bool((index[1:] > index[:-1]).all()):
            repeated = index.numel() - index.unique().numel()
            raise ValueError(
                f"{name} must ascend without repeating a position, got {repeated} repeated"
            )
        _checked[index] = (version_of(index), shape)
    return index.numel()


def _check_weight(weight: Weight, x: Tensor) -> None:
    """Raises TypeError or ValueError unless weight and x (..., K) can be multiplied."""
    if isinstance(weight, Tensor):
        check_weight("weight", weight, x)
        return
    if not isinstance(weight, Panels):
        raise TypeError(f"weight must be a tensor or Panels, got {type(weight).__name__}")
    check_floating(x=x)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must have shape (..., {weight.shape[1]}) to go with weight {weight.shape}, "
            f"got {tuple(x.shape)}"
        )
