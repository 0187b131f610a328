"""A linear layer of which scattered entries of the weight are trained (SpIEL).

With W = W0 + scatter(delta, index):

    y = x Wᵀ + b        dx = dy W        d_delta[e] = sum over m of dy[m, row_e] x[m, col_e]

It saves x and nothing else of the size of an activation or of the weight.

mode="inplace": the entries lie in the dense weight, so y and dx are one dense GEMM each.
mode="additive": delta is scattered into a copy of the weight, or into the dense weight that a
callable makes of a quantized one, in forward and again in backward. Neither is kept between them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from s2kernels import backend, reference
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
from s2kernels.autograd.linear import as_tokens
from s2kernels.plan import TilePlan, index_dtype, rows_and_columns

Weight = Tensor | Callable[[], Tensor]
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
    base: Tensor | None = None,
    plan: TilePlan | None = None,
    mode: str = "inplace",
    impl: str | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Linear layer with trained entries: y = x (W0 + scatter(delta, index))ᵀ + bias.

    x:       (..., K), any number of tokens, none included
    weight:  (N, K), frozen, in the dtype of x (autocast casts both). In additive mode also a
             callable that returns such a weight, a new one at every call: it is called in forward
             and again in backward, and delta is written into what it returns.
    delta:   (k,), zero at the start, fp32 by default
    index:   (k,) flat positions row * K + column, ascending, without repeats; contiguous, int32
             where N * K < 2**31, else int64
    bias:    (N,), frozen or trained
    base:    (k,) the entries of W0, in the weight's dtype, for mode="inplace": the entries are
             written here, before the forward GEMM and again before dx, so that several deltas may
             take turns in one weight. Without, the caller has written them (`sparse_write`, one
             launch for a whole model).
    plan:    `tile_plan(index, (N, K))`, made once for an index; without it, backward makes one
    mode:    "inplace": `weight` holds W0 + delta at its entries. "additive": it holds W0.
    impl:    "triton", "torch", or None to let `s2kernels.backend` decide
    observe: called in backward with dy (M, N) and x (M, K), which it must not change: what a growth
             phase wants to know about other entries, without computing anything twice

    Returns y (..., N) in x.dtype. Gradients: x, delta (in delta.dtype), bias.

    Raises TypeError or ValueError, before anything is written, for a wrong dtype, shape, device,
    mode, index or plan. The content of an index is looked at once for each of its versions.
    """
    check_choice("mode", mode, MODES)
    if mode == "inplace" and not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor for mode='inplace', got {type(weight).__name__}")
    dense, rebuild = _dense(weight)
    check_weight("weight", dense, x)
    check_floating(delta=delta, bias=bias, base=base)
    check_device(x.device, delta=delta, bias=bias, base=base)
    shape = (dense.shape[0], dense.shape[1])
    num = check_entries("index", index, shape)
    check_device(x.device, index=index)
    check_shape("delta", delta, num, why="one value for each entry of index")
    if bias is not None:
        check_shape("bias", bias, shape[0], why="out_features of weight")
    if base is not None:
        if mode == "additive":
            raise ValueError("base goes with mode='inplace'; mode='additive' writes no weight")
        check_shape("base", base, num, why="one value for each entry of index")
        if base.dtype != dense.dtype:
            raise TypeError(f"base must be of the dtype of weight, {dense.dtype}, got {base.dtype}")
    if plan is not None and (plan.shape != shape or len(plan.order) != num):
        raise ValueError(
            f"plan must be of {num} entries of a weight {shape}, "
            f"got one of {len(plan.order)} entries of {plan.shape}"
        )
    return _apply(x, dense, rebuild, delta, index, bias, base, plan, mode, None, impl, observe)


def linear(
    x: Tensor,
    weight: Weight,
    delta: Tensor,
    index: Tensor,
    bias: Tensor | None,
    mode: str,
    plan: TilePlan | None = None,
    before_dx: Callable[[], None] | None = None,
    impl: str | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """`sparse_linear` for a caller that has checked its arguments once and for all, as a host has.

    before_dx is called in backward before `weight` is read: the host puts the entries back there,
    if something took them out of the weight after the forward (a disabled adapter, a state_dict).
    """
    dense, rebuild = _dense(weight)
    return _apply(x, dense, rebuild, delta, index, bias, None, plan, mode, before_dx, impl, observe)


class SparseLinearFunction(torch.autograd.Function):
    """y (M, N) from x (M, K); see `sparse_linear`. rebuild makes the weight again in backward."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        delta,
        index,
        base,
        rebuild,
        plan,
        mode,
        before_dx,
        impl,
        observe,
    ):
        ops = backend.select(x, impl)
        if base is not None:
            ops.sparse_write([weight], [base], [delta], [index])
        if mode == "additive":
            used = _scattered(weight, rebuild is not None, delta, index, x.dtype)
        else:
            used = weight.to(x.dtype)
        y = ops.linear(x, used, None if bias is None else bias.to(x.dtype))

        ctx.needs_dx, _, ctx.needs_dbias, ctx.needs_delta = ctx.needs_input_grad[:4]
        # delta is saved in inplace mode too: a step of the optimizer between forward and backward
        # changes what dx ought to be, and autograd notices it by the version of a saved tensor.
        # So it does for an index that a selection has changed.
        ctx.save_for_backward(
            x if ctx.needs_delta or observe is not None else None,
            weight if ctx.needs_dx and rebuild is None else None,
            delta,
            index,
            base,
        )
        ctx.rebuild, ctx.plan, ctx.mode, ctx.impl = rebuild, plan, mode, impl
        ctx.before_dx, ctx.observe = before_dx, observe
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, delta, index, base = ctx.saved_tensors
        ops = backend.select(dy, ctx.impl)
        dx = dbias = d_delta = None
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_dx:
                if base is not None:
                    ops.sparse_write([weight], [base], [delta], [index])
                elif ctx.before_dx is not None:
                    ctx.before_dx()
                fresh = ctx.rebuild is not None
                used = ctx.rebuild() if fresh else weight
                if ctx.mode == "additive":
                    used = _scattered(used, fresh, delta, index, dy.dtype)
                dx = ops.linear_dx(dy, used.to(dy.dtype))
                del used
            if ctx.needs_delta:
                d_delta = ops.sparse_grad(dy, x, index, ctx.plan).to(delta.dtype)
            if ctx.needs_dbias:
                dbias = dy.sum(0)
            if ctx.observe is not None:
                ctx.observe(dy, x)
        return dx, None, dbias, d_delta, None, None, None, None, None, None, None, None


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
    if torch.compiler.is_compiling() or index.is_meta:
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


def _dense(weight: Weight) -> tuple[Tensor, Callable[[], Tensor] | None]:
    """A dense weight, and what makes it again where it is not one already."""
    if isinstance(weight, Tensor):
        return weight, None
    if not callable(weight):
        kind = type(weight).__name__
        raise TypeError(f"weight must be a tensor or a function that makes one, got {kind}")
    with torch.no_grad():
        return weight(), weight


def _apply(x, dense, rebuild, delta, index, bias, base, plan, mode, before_dx, impl, observe):
    y = SparseLinearFunction.apply(
        as_tokens(x),
        dense,
        bias,
        delta,
        index,
        base,
        rebuild,
        plan,
        mode,
        before_dx,
        impl,
        observe,
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def _scattered(weight, fresh, delta, index, dtype):
    """The weight with delta added at its entries: written into it where it is fresh, or a copy.

    By plain torch: the kernel's table of addresses is made for weights that stay where they are.
    """
    base = weight[rows_and_columns(index, weight.shape[1])]  # rounded to dtype after the sum alone
    used = weight.to(dtype)
    if used is weight and not fresh:
        used = weight.clone()
    reference.sparse_write([used], [base], [delta], [index])
    return used
