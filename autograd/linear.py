"""A linear layer of which only a slice is trained (S2FT section 3.3: partial back-propagation).

With W = W0 + scatter(delta, index):

    y = x Wᵀ + b        dx = dy W
    dim="in"   d_delta = dyᵀ x[:, index]     saves a copy of x[:, index], (M, R), and no other x
    dim="out"  d_delta = dy[:, index]ᵀ x     saves x

mode="inplace": the slice lies in the dense weight, so y and dx are one dense GEMM each.
mode="additive": the weight stays as it is, and the slice's part is added to y and to dx.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from s2kernels import backend
from s2kernels.autograd.accumulate import (
    Owned,
    WeightHolder,
    check_unscaled,
    is_stepped,
    owner_of,
    slot_of,
)
from s2kernels.autograd.checks import (
    MODES,
    check_choice,
    check_device,
    check_floating,
    check_shape,
    check_slice,
    check_weight,
    compute_dtype,
)
from s2kernels.autograd.first_order import apply, cast, first_order
from s2kernels.reference import Index, like_tokens, take
from s2kernels.update import Update


def s2_linear(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    index: Index,
    *,
    dim: str,
    bias: Tensor | None = None,
    mode: str = "inplace",
    impl: str | None = None,
) -> Tensor:
    """Linear layer with a trained slice: y = x (W0 + scatter(delta, index))ᵀ + bias.

    x:          (..., K), any number of tokens, none included
    weight:     (N, K), frozen, in the dtype of x (autocast casts both)
    delta:      (N, R) for dim="in", (R, K) for dim="out"; zero at the start, fp32 by default
    index:      R trained input or output channels: int32 tensor, or slice(start, stop)
    bias:       (N,), frozen or trained
    mode:       "inplace": `weight` holds W0 + delta in its slice, in forward and in backward: the
                caller has written it (`slice_write`, one launch for a whole model).
                "additive": `weight` holds W0.
    impl:       "triton", "torch", or None to let `s2kernels.backend` decide

    Returns y (..., N) in x.dtype. Gradients: x, delta (in delta.dtype), bias.

    Raises TypeError or ValueError for a wrong dtype, shape, device, dim, mode or index.
    """
    check_choice("mode", mode, MODES)
    check_weight("weight", weight, x)
    check_slice("weight", tuple(weight.shape), x.device, delta, index, dim)
    check_floating(bias=bias)
    check_device(x.device, bias=bias)
    if bias is not None:
        check_shape("bias", bias, weight.shape[0], why="out_features of weight")
    return apply(S2LinearFunction, x, *operands(weight, delta, index, dim, bias, mode, impl=impl))


def s2_delta(
    y: Tensor, x: Tensor, delta: Tensor, index: Index, *, dim: str, impl: str | None = None
) -> Tensor:
    """Adds a trained slice's part to the output of any base layer: additive mode on its own.

    y + x[..., index] deltaᵀ for dim="in", y with x deltaᵀ added at [..., index] for dim="out".
    For bases that `s2_linear` cannot take: quantized or wrapped layers, further adapters.

    y (..., N), x (..., K), delta (N, R) or (R, K), index as in `s2_linear`. Returns a new tensor.
    Gradients: y, x, delta. Raises as `s2_linear` does.
    """
    check_floating(y=y, x=x, delta=delta)
    check_device(x.device, y=y)
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y must have the tokens of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    if y.dtype != compute_dtype(x):
        raise TypeError(f"y must be of the dtype {compute_dtype(x)} computed in, got {y.dtype}")
    check_slice("the base layer", (y.shape[-1], x.shape[-1]), x.device, delta, index, dim)
    return delta_linear(y, x, delta, index, dim, impl)


def operands(
    weight: Tensor,
    delta: Tensor,
    index: Index,
    dim: str,
    bias: Tensor | None,
    mode: str,
    holding: WeightHolder | None = None,
    impl: str | None = None,
) -> tuple:
    """What `S2LinearFunction` takes beside x, for the host, which calls it again and again.

    The backward runs inside `holding`: there the host writes the slice again, if something has
    restored the weight since the forward (a disabled adapter, a state_dict).
    """
    return weight, bias, delta, *split_index(index), dim, mode, holding, impl


def delta_linear(
    y: Tensor, x: Tensor, delta: Tensor, index: Index, dim: str, impl: str | None = None
) -> Tensor:
    """`s2_delta` for a caller that has checked its arguments."""
    index_tensor, start = split_index(index)
    out = S2DeltaFunction.apply(
        as_matrix(y), as_matrix(in_compute_dtype(x)), delta, index_tensor, start, dim, impl
    )
    return out.view(y.shape)


class S2LinearFunction(torch.autograd.Function):
    """y (..., N) from x (..., K); see `s2_linear`. index is None where the slice starts at `start`.

    Here and in the other Functions tokens are laid out as a matrix inside, and the gradient of x is
    cast to its dtype by autograd: views and casts outside would be nodes of the graph.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, delta, index, start, dim, mode, holding, impl):
        x = in_compute_dtype(x)
        tokens = as_matrix(x)
        ops = backend.select(x, impl)
        where = join_index(index, start, delta, dim)

        needs_dx, _, ctx.needs_dbias, needs_delta = ctx.needs_input_grad[:4]
        compact = needs_delta and dim == "in"
        # before the GEMM, while what produced x has left it in the cache
        operand = take(tokens, where) if compact else tokens
        dense = cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype)
        if mode == "inplace":
            y = ops.linear(x, *dense)
        elif compact:
            y = like_tokens(ops.linear_plus_slice(tokens, *dense, operand, delta), x.shape)
        else:
            y = ops.slice_linear_(ops.linear(tokens, *dense), tokens, delta, where, dim)
            y = like_tokens(y, x.shape)

        # delta is saved in inplace mode too: a step of the optimizer between forward and backward
        # changes what dx ought to be, and autograd notices it by the version of a saved tensor.
        ctx.save_for_backward(
            operand if needs_delta else None, weight if needs_dx else None, delta, index
        )
        ctx.start, ctx.dim, ctx.mode, ctx.impl = start, dim, mode, impl
        ctx.owned = owner_of(delta)
        ctx.holding = holding if needs_dx or is_stepped(ctx.owned) else None
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        operand, weight, delta, index = ctx.saved_tensors
        shape, dy = dy.shape, as_matrix(dy)
        ops = backend.select(dy, ctx.impl)
        dim, where = ctx.dim, join_index(index, ctx.start, delta, ctx.dim)
        dx = dbias = d_delta = None
        if weight is not None:
            dense = cast(weight, dy.dtype)
            if ctx.mode == "inplace":
                dx = ops.linear_dx(dy, dense)
            elif dim == "out" and isinstance(where, slice):
                dx = ops.linear_dx_plus_slice(dy, dense, dy[:, where], delta)
            else:
                dx = ops.linear_dx(dy, dense)
                ops.slice_linear_dx_(dx, dy, delta, where, dim)
        if operand is not None:
            d_delta = delta_grad(ctx, ops, dy, operand, where, dim, delta, ctx.owned)
        if ctx.needs_dbias:
            dbias = dy.sum(0)
        dx = None if dx is None else dx.view(*shape[:-1], dx.shape[-1])
        return dx, None, dbias, d_delta, None, None, None, None, None, None


class S2DeltaFunction(torch.autograd.Function):
    """y + the slice's part, (M, N); see `s2_delta`."""

    @staticmethod
    def forward(ctx, y, x, delta, index, start, dim, impl):
        ops = backend.select(x, impl)
        where = join_index(index, start, delta, dim)
        _, needs_dx, needs_delta = ctx.needs_input_grad[:3]
        compact = needs_delta and dim == "in"
        operand = take(x, where) if compact else x
        out = ops.slice_linear_(y.clone(), operand, delta, None if compact else where, dim)
        ctx.save_for_backward(operand if needs_delta else None, delta, index)
        ctx.in_features, ctx.needs_dx = x.shape[1], needs_dx
        ctx.start, ctx.dim, ctx.impl, ctx.owned = start, dim, impl, owner_of(delta)
        ctx.holding = None
        return out

    @staticmethod
    @first_order
    def backward(ctx, dy):
        operand, delta, index = ctx.saved_tensors
        dx = d_delta = None
        ops = backend.select(dy, ctx.impl)
        dim, where = ctx.dim, join_index(index, ctx.start, delta, ctx.dim)
        if ctx.needs_dx and dim == "out":  # all of dx, so that nothing need be zero before
            dx = ops.linear_dx(take(dy, where), cast(delta, dy.dtype))
        elif ctx.needs_dx:
            dx = dy.new_zeros(dy.shape[0], ctx.in_features)
            ops.slice_linear_dx_(dx, dy, delta, where, dim)
        if operand is not None:
            d_delta = delta_grad(ctx, ops, dy, operand, where, dim, delta, ctx.owned)
        return dy, dx, d_delta, None, None, None, None


def delta_grad(node, ops, dy, operand, where, dim, delta, owned: Owned | None):
    """d_delta in delta.dtype, or None where it was used otherwise; see autograd.accumulate.

    Nothing of the backward may read delta or its slice of the weight after this: an owner may have
    it do its step.

    node: the ctx of the backward. An in-slice's operand is already compact. owned: what `owner_of`
    gave for the parameter in forward, of which `delta` may be a copy.
    """
    where = None if dim == "in" else where
    if owned is not None and owned[2] is not None:
        check_unscaled(dy)
    slot = slot_of(node, owned)
    if owned is None or slot is None:
        return cast(ops.slice_grad(dy, operand, where, dim), delta.dtype)
    if not isinstance(slot, Update):
        ops.slice_grad(dy, operand, where, dim, out=slot)
        return None
    parameter = owned[0]
    with nullcontext() if node.holding is None else node.holding.writing(parameter) as written:
        # a backward that still needs what it was is to notice it
        torch.autograd.graph.increment_version(parameter)
        ops.slice_grad(dy, operand, where, dim, out=slot._replace(slice=written))
    return None


def in_compute_dtype(x: Tensor) -> Tensor:
    """x in the dtype the layer computes in."""
    # asked here, too, since it is nearly never so
    return x.to(compute_dtype(x)) if torch._C._is_any_autocast_enabled() else x


def as_matrix(x: Tensor) -> Tensor:
    """x (..., K) as (M, K)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def split_index(index: Index) -> tuple[Tensor | None, int]:
    """A Function takes a tensor or an int: torch.compile traces no argument that is a slice."""
    return (None, index.start) if isinstance(index, slice) else (index, 0)


def join_index(index: Tensor | None, start: int, delta: Tensor, dim: str) -> Index:
    if index is not None:
        return index
    return slice(start, start + delta.shape[1 if dim == "in" else 0])
