"""A gated FFN of which a set of channels is trained, as one Function.

    gate = x Wgᵀ + bg    up = x Wuᵀ + bu    h = silu(gate) * up    y = h Wdᵀ + bd

The trained set S of FFN channels is shared by the three coupled weights (S2FT section 3.1): rows S
of Wg and Wu, columns S of Wd, in any combination. Backward, with W the weights as trained:

    dh = dy Wd    dgate, dup = swiglu_bwd(dh)    dx = dgate Wg + dup Wu
    d_down = dyᵀ h[:, S]    d_gate = dgate[:, S]ᵀ x    d_up = dup[:, S]ᵀ x

It saves gate and up, and x where gate or up is trained. h is never saved: the backward of SwiGLU
rebuilds h[:, S], and writes dgate and dup over gate and up. Where Wg and Wu lie one after the other
in memory (`join_`), gate and up are one GEMM, and so is dx.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2kernels import backend
from s2kernels.autograd.accumulate import WeightHolder, is_stepped, owner_of
from s2kernels.autograd.checks import (
    MODES,
    check_choice,
    check_device,
    check_floating,
    check_shape,
    check_slice,
    check_weight,
)
from s2kernels.autograd.first_order import apply, cast, first_order
from s2kernels.autograd.joined import add_dx, joined, project
from s2kernels.autograd.linear import (
    as_matrix,
    delta_grad,
    in_compute_dtype,
    join_index,
    split_index,
)
from s2kernels.reference import Index, like_tokens, take


def s2_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    index: Index,
    *,
    gate_delta: Tensor | None = None,
    up_delta: Tensor | None = None,
    down_delta: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    mode: str = "inplace",
    impl: str | None = None,
) -> Tensor:
    """Gated FFN with trained channels: down(silu(gate(x)) * up(x)).

    x:                      (..., K), any number of tokens, none included
    gate_weight, up_weight: (F, K), frozen; down_weight: (N, F), frozen
    index:                  R trained FFN channels: int32 tensor, or slice(start, stop)
    gate_delta, up_delta:   (R, K) or None where frozen; down_delta: (N, R) or None; one at least
    biases:                 (F,), (F,), (N,), frozen or trained, or None
    mode:                   "inplace": the weights hold W0 + delta in their slices already
                            (`slice_write`). "additive": they hold W0.
    impl:                   "triton", "torch", or None to let `s2kernels.backend` decide

    Returns y (..., N) in x.dtype. Gradients: x, deltas (in their dtype), biases.

    Raises TypeError or ValueError for a wrong dtype, shape, device, mode or index.
    """
    check_choice("mode", mode, MODES)
    check_weight("gate_weight", gate_weight, x)
    check_weight("up_weight", up_weight, x)
    check_shape("up_weight", up_weight, *gate_weight.shape, why="the shape of gate_weight")
    num_channels = gate_weight.shape[0]
    check_weight("down_weight", down_weight, x.new_empty(0, num_channels))

    deltas = {"gate": gate_delta, "up": up_delta, "down": down_delta}
    if all(delta is None for delta in deltas.values()):
        raise ValueError("one of gate_delta, up_delta, down_delta must be given, got none")
    weights = {"gate": gate_weight, "up": up_weight, "down": down_weight}
    for name, delta in deltas.items():
        if delta is not None:
            dim, shape = "in" if name == "down" else "out", tuple(weights[name].shape)
            check_slice(f"{name}_weight", shape, x.device, delta, index, dim)
    for name, bias in {"gate": gate_bias, "up": up_bias, "down": down_bias}.items():
        if bias is not None:
            check_floating(**{f"{name}_bias": bias})
            check_device(x.device, **{f"{name}_bias": bias})
            check_shape(f"{name}_bias", bias, weights[name].shape[0], why=f"rows of {name}_weight")

    given = operands(
        (gate_weight, up_weight, down_weight),
        (gate_bias, up_bias, down_bias),
        (gate_delta, up_delta, down_delta),
        index,
        mode,
        joined(gate_weight, up_weight),
        impl=impl,
    )
    return apply(S2MLPFunction, x, *given)


def operands(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    deltas: Sequence[Tensor | None],
    index: Index,
    mode: str,
    both: Tensor | None = None,
    holding: WeightHolder | None = None,
    impl: str | None = None,
) -> tuple:
    """What `S2MLPFunction` takes beside x, for the host, which calls it again and again.

    weights, biases and deltas are those of gate, up and down. both: `joined` of the weights of gate
    and up, (2 F, K), or None. The backward runs inside `holding`: there the host writes the
    slices again, if something has restored the weights since the forward.
    """
    if (biases[0] is None) != (biases[1] is None):
        both = None
    return *weights, *biases, *deltas, *split_index(index), mode, both, holding, impl


class S2MLPFunction(torch.autograd.Function):
    """y (..., N) from x (..., K); see `s2_mlp`. index is None where the run starts at `start`."""

    @staticmethod
    def forward(
        ctx,
        x,
        gate_weight,
        up_weight,
        down_weight,
        gate_bias,
        up_bias,
        down_bias,
        gate_delta,
        up_delta,
        down_delta,
        index,
        start,
        mode,
        both,
        holding,
        impl,
    ):
        shape, x = x.shape, as_matrix(in_compute_dtype(x))
        ops = backend.select(x, impl)
        where = _channels(index, start, gate_delta, up_delta, down_delta)
        additive = mode == "additive"
        if both is None:
            gate_up = None
            gate, up = project(ops, x, gate_weight, gate_bias), project(ops, x, up_weight, up_bias)
        else:
            gate_up = project(ops, x, both, gate_bias, up_bias)
            gate, up = gate_up.chunk(2, 1)
        for out, delta in ((gate, gate_delta), (up, up_delta)) if additive else ():
            if delta is not None:
                ops.slice_linear_(out, x, delta, where, "out")
        h = ops.swiglu(gate, up)
        if additive and down_delta is not None:
            y = project(ops, h, down_weight, down_bias)
            y = like_tokens(ops.slice_linear_(y, h, down_delta, where, "in"), shape)
        else:
            y = project(ops, h.view(*shape[:-1], h.shape[1]), down_weight, down_bias)

        ctx.needs_dx = ctx.needs_input_grad[0]
        ctx.needs_dbias = ctx.needs_input_grad[4:7]
        ctx.needs_delta = ctx.needs_input_grad[7:10]
        needs_x = ctx.needs_delta[0] or ctx.needs_delta[1]
        ctx.needs_dh = ctx.needs_dx or needs_x or any(ctx.needs_dbias[:2])
        ctx.save_for_backward(
            x if needs_x else None,
            *((gate, up) if gate_up is None else (gate_up, None)),
            *((gate_weight, up_weight) if ctx.needs_dx else (None, None)),
            down_weight if ctx.needs_dh else None,
            *(gate_delta, up_delta, down_delta),
            index,
        )
        ctx.start, ctx.mode, ctx.both, ctx.impl = start, mode, both, impl
        ctx.owned = [owner_of(delta) for delta in (gate_delta, up_delta, down_delta)]
        ctx.holding = holding if ctx.needs_dh or any(map(is_stepped, ctx.owned)) else None
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x, gate, up, gate_weight, up_weight, down_weight, *deltas, index = ctx.saved_tensors
        shape, dy = dy.shape, as_matrix(dy)
        gate_delta, up_delta, down_delta = deltas
        gate_owned, up_owned, down_owned = ctx.owned
        ops = backend.select(dy, ctx.impl)
        where = _channels(index, ctx.start, *deltas)
        additive = ctx.mode == "additive"
        needs_gate, needs_up, needs_down = ctx.needs_delta
        dx = d_gate = d_up = d_down = None
        dbias = [None, None, None]
        gate_up = gate if up is None else None
        if up is None:
            gate, up = gate_up.chunk(2, 1)
        if ctx.needs_dh:
            rebuilt = where if needs_down else None
            d_gate_up, dgate, dup = room_for_gradients(gate_up, gate, up)
            weight, out = cast(down_weight, dy.dtype), (dgate, dup)
            if additive and down_delta is not None:
                dh = ops.linear_dx(dy, weight)
                ops.slice_linear_dx_(dh, dy, down_delta, where, "in")
                *_, h_slice = ops.swiglu_bwd(dh, gate, up, rebuilt, out)
                del dh
            else:
                *_, h_slice = ops.linear_dx_swiglu_bwd(dy, weight, gate, up, rebuilt, out)
            del weight
        elif needs_down:
            h_slice = ops.swiglu(take(gate, where), take(up, where))
        if needs_down:
            d_down = delta_grad(ctx, ops, dy, h_slice, where, "in", down_delta, down_owned)
        if ctx.needs_dx:
            # under hooks on saved tensors, or after they were moved, they lie elsewhere
            if d_gate_up is not None and _are_halves(ctx.both, gate_weight, up_weight):
                dx = add_dx(ops, None, d_gate_up, ctx.both)
            else:
                dx = add_dx(ops, add_dx(ops, None, dgate, gate_weight), dup, up_weight)
            if additive and gate_delta is not None:
                ops.slice_linear_dx_(dx, dgate, gate_delta, where, "out")
            if additive and up_delta is not None:
                ops.slice_linear_dx_(dx, dup, up_delta, where, "out")
        # now that nobody reads gate_delta and up_delta any more, nor their weights
        if needs_gate:
            d_gate = delta_grad(ctx, ops, dgate, x, where, "out", gate_delta, gate_owned)
        if needs_up:
            d_up = delta_grad(ctx, ops, dup, x, where, "out", up_delta, up_owned)
        for i, needs_dbias in enumerate(ctx.needs_dbias):
            if needs_dbias:
                dbias[i] = (dy if i == 2 else (dgate, dup)[i]).sum(0)
        dx = None if dx is None else dx.view(*shape[:-1], dx.shape[-1])
        return dx, None, None, None, *dbias, d_gate, d_up, d_down, *[None] * 6


def _are_halves(both: Tensor, gate_weight: Tensor, up_weight: Tensor) -> bool:
    """Whether the weights are those that `both` was made of."""
    start = both.data_ptr()
    return (gate_weight.data_ptr(), up_weight.data_ptr()) == (start, start + both.nbytes // 2)


def room_for_gradients(gate_up, gate, up):
    """Where dgate and dup are written: over gate and up, the halves of gate_up if that is given.

    But in memory of their own if the graph is kept, for another backward that needs gate and up,
    and under torch.compile, which plans the memory itself.
    """
    keep = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
    if not keep:  # whoever else has hold of them is told so by autograd
        torch._C._increment_version([gate, up] if gate_up is None else [gate_up])
        return gate_up, gate, up
    if gate_up is None:
        return None, torch.empty_like(gate), torch.empty_like(up)
    gate_up = torch.empty_like(gate_up)
    return gate_up, *gate_up.chunk(2, 1)


def _channels(index, start, gate_delta, up_delta, down_delta):
    """The trained channels; their number is that of whichever delta there is."""
    if down_delta is not None:
        return join_index(index, start, down_delta, "in")
    return join_index(index, start, gate_delta if gate_delta is not None else up_delta, "out")
