"""Every op in plain torch: the oracle of the tests, the CPU path, and the peer of the kernels.

Sizes: M tokens, N out_features, K in_features, R trained channels. A weight is (N, K).
A slice of it is named by `dim` and `index`:

    dim="in"   trained input channels  = columns of the weight, delta (N, R)
    dim="out"  trained output channels = rows of the weight,    delta (R, K)

`index` holds the R trained positions on that dimension, without repeats: a contiguous int32
tensor, or a `slice(start, start + R)` where they form one run, which is what co-permutation
arranges for. Where an op says `index=None`, the operand that would be gathered is already the
compact (M, R) slice. Activations and weights of one call share a dtype; deltas have their own, fp32
by default. Accumulation is in fp32, or fp64 for fp64 operands.

The ops of scattered entries are those of s2kernels.sparse, and the ops of many adapters in one
batch those of s2kernels.grouped, under the same names here.

`s2kernels.kernels` holds the same names and signatures in Triton. Neither checks its arguments: the
public functions of s2kernels.autograd do.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from s2kernels.grouped import grouped_in_ as grouped_in_
from s2kernels.grouped import grouped_out_ as grouped_out_
from s2kernels.plan import tile_plan as tile_plan
from s2kernels.sparse import growth_candidates as growth_candidates
from s2kernels.sparse import sm3_growth as sm3_growth
from s2kernels.sparse import sm3_update as sm3_update
from s2kernels.sparse import sparse_grad as sparse_grad
from s2kernels.sparse import sparse_write as sparse_write
from s2kernels.update import Update

Index = Tensor | slice

_silu_backward = torch.ops.aten.silu_backward.grad_input
_unsafe_view = torch.ops.aten._unsafe_view.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b for x (..., K), weight (N, K), bias (N,); y (..., N) in x.dtype."""
    if bias is None or x.dim() == 2:
        return F.linear(x, weight, bias)
    # Here F.linear may give a view, and what a Function returns as one must not be written to.
    return like_tokens(F.linear(x.reshape(-1, x.shape[-1]), weight, bias), x.shape)


def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """dx = dy W for dy (M, N), weight (N, K); dx (M, K) in dy.dtype."""
    return dy @ weight


def slice_grad(
    dy: Tensor,
    x: Tensor,
    index: Index | None,
    dim: str,
    out: Tensor | Update | None = None,
) -> Tensor:
    """Gradient of a slice of the weight (S2FT section 3.3).

    dim="in":  dyᵀ x[:, index], (N, R); with index=None, x is the compact slice (M, R).
    dim="out": dy[:, index]ᵀ x, (R, K); with index=None, dy is the compact slice (M, R).

    Returns it in fp32 (fp64 for fp64 operands), or adds it into `out`, of that shape and of any
    floating dtype, and returns `out`. Or uses it up in `out`, a step of AdamW, which is then done,
    and returns its values.
    """
    if isinstance(out, Update):
        return _adamw(out, slice_grad(dy, x, index, dim))
    if index is not None:
        dy, x = (dy, take(x, index)) if dim == "in" else (take(dy, index), x)
    acc = _accumulator(dy)
    if dy.dtype != acc:
        dy, x = dy.to(acc), x.to(acc)
    # The narrow operand is the one to transpose: a BLAS on CPU takes thrice as long for the other.
    transposed = dim == "in"
    a, b = (x, dy) if transposed else (dy, x)
    if out is None:
        grad = a.t() @ b
        return grad.t().contiguous() if transposed else grad
    target = out.t() if transposed else out
    if out.dtype == acc:
        target.addmm_(a.t(), b)
    else:
        target.copy_(torch.addmm(target.to(acc), a.t(), b))
    return out


def _adamw(update: Update, grad: Tensor) -> Tensor:
    """The step of `s2kernels.update` by this gradient, and what follows in the weight."""
    values, exp_avg, exp_avg_sq, coefficients, (beta1, beta2), eps, written = update
    decay, step_size, correction = coefficients
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    size = exp_avg_sq.sqrt().mul_(correction).add_(eps)
    values.mul_(decay).sub_(size.reciprocal_().mul_(exp_avg).mul_(step_size))
    if written is not None:
        weight, base, where, dim = written
        slice_write([weight], [base], [values], [where], [dim])
    return values


def slice_grad_each(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    index: Index | None,
    dim: str,
    out: Tensor,
) -> Tensor:
    """Gradients of the same slice, or of one of its own, of each expert of a mixture.

    dy (S, N), x (S, K) hold S pairs of a token and an expert, sorted by expert; offsets, int32
    (E,), says where those of each expert end. Adds `slice_grad` of the pairs of expert e to out[e],
    (N, R) for dim="in", (R, K) for dim="out", which stays as it is where there are none.

    index is int32 (E, R), contiguous, or a slice that is the same in all experts, or None as of
    slice_grad. out is (E, N, R) or (E, R, K), of any floating dtype; returns it.

    Waits for the device, which knows the offsets; the kernel does not.
    """
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            where = index[expert] if isinstance(index, Tensor) else index
            slice_grad(dy[start:end], x[start:end], where, dim, out[expert])
        start = end
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """h = silu(gate) * up, elementwise on (M, K)."""
    return F.silu(gate).mul_(up)


def swiglu_bwd(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    index: Index | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Backward of `swiglu`, which also rebuilds the slice of h that a trained down_proj needs.

    With s = sigmoid(gate): dgate = dh * up * s * (1 + gate * (1 - s)), dup = dh * gate * s.
    Returns dgate (M, K), dup (M, K) and h[:, index] as a compact (M, R), or None for index=None.
    With `out`, dgate and dup are written there; out=(gate, up) writes them over their operands.
    """
    dgate, dup = (torch.empty_like(gate), torch.empty_like(up)) if out is None else out
    acc = _accumulator(gate)
    if gate.dtype == acc:
        h_slice = _swiglu_bwd(dh, gate, up, dgate, dup, index)
    else:
        # the slice of h is rounded as `swiglu` rounds it
        h_slice = None if index is None else swiglu(take(gate, index), take(up, index))
        g, u = gate.to(acc), up.to(acc)
        _swiglu_bwd(dh.to(acc), g, u, g, u, None)
        dgate.copy_(g)
        dup.copy_(u)
    return dgate, dup, h_slice


def _swiglu_bwd(
    dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, index: Index | None
) -> Tensor | None:
    """dgate may be gate, and dup may be up: each operand is read before it is written over."""
    d_silu = dh * up
    h_slice = None if index is None else take(up, index)
    torch._C._nn.silu(gate, out=dup)  # type: ignore[call-arg]
    if h_slice is not None and index is not None:
        h_slice.mul_(take(dup, index))
    dup.mul_(dh)
    _silu_backward(d_silu, gate, grad_input=dgate)
    return h_slice


def linear_dx_swiglu_bwd(
    dy: Tensor,
    weight: Tensor,
    gate: Tensor,
    up: Tensor,
    index: Index | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """swiglu_bwd of dh = dy W: dgate, dup (M, K), h[:, index] (M, R), or None for index=None.

    dy (M, N), weight (N, K) of down_proj, gate, up (M, K); `out` as of swiglu_bwd.
    """
    return swiglu_bwd(linear_dx(dy, weight), gate, up, index, out)


@torch.no_grad()
def slice_write(
    weights: Sequence[Tensor],
    base_slices: Sequence[Tensor],
    deltas: Sequence[Tensor | None],
    indices: Sequence[Index],
    dims: Sequence[str],
) -> None:
    """Overwrite the slice of every weight with base_slice + delta, in place.

    The sum is rounded once, to the weight's dtype; a delta of None restores the base slice bit for
    bit. Neither autograd nor the weight's version counter sees the write: a weight saved for
    backward stays usable, and it is the caller who guarantees that it then holds the same values.
    """
    slice_writer(weights, base_slices, deltas, indices, dims)()


def slice_writer(
    weights: Sequence[Tensor],
    base_slices: Sequence[Tensor],
    deltas: Sequence[Tensor | None],
    indices: Sequence[Index],
    dims: Sequence[str],
) -> Callable[[], None]:
    """`slice_write` of these tensors, to be called as often as is wanted while they stay where they
    lie in memory: what depends on that alone is looked up once.
    """
    runs: list[tuple] = []
    scattered: list[tuple] = []
    for weight, base, delta, index, dim in zip(
        weights, base_slices, deltas, indices, dims, strict=True
    ):
        weight, axis = weight.data, 1 if dim == "in" else 0
        delta = None if delta is None else delta.detach()
        if isinstance(index, slice):
            target = weight.narrow(axis, index.start, index.stop - index.start)
            runs.append((target, base, delta))
        else:
            scattered.append((weight, axis, index.long(), base, delta))

    def write() -> None:
        for target, base, delta in runs:
            if delta is None:
                target.copy_(base)
            elif torch.compiler.is_compiling():  # which takes no out that is not contiguous
                target.copy_(base + delta)
            else:  # one pass; torch adds half types in fp32 and rounds the sum once, too
                torch.add(base, delta, out=target)
        for weight, axis, where, base, delta in scattered:
            value = base if delta is None else base + delta
            weight.index_copy_(axis, where, value.to(weight.dtype))

    return write


def slice_linear_(y: Tensor, x: Tensor, delta: Tensor, index: Index | None, dim: str) -> Tensor:
    """Add the part of a linear layer's output that comes from the slice (additive mode), in place.

    dim="in":  y += x[:, index] deltaᵀ; with index=None, x is the compact slice (M, R).
    dim="out": y[:, index] += x deltaᵀ.

    y (M, N), x (M, K); delta is cast to x.dtype, x never is. Returns y.
    """
    delta = delta.to(x.dtype)
    if dim == "in":
        return y.addmm_(x if index is None else take(x, index), delta.t())
    assert index is not None
    return _add_at(y, x, delta.t(), index)


def slice_linear_dx_(dx: Tensor, dy: Tensor, delta: Tensor, index: Index, dim: str) -> Tensor:
    """Add the part of dx that comes from the slice (additive mode), in place.

    dim="in":  dx[:, index] += dy delta.
    dim="out": dx += dy[:, index] delta.

    dx (M, K), dy (M, N); delta is cast to dy.dtype. Returns dx.
    """
    delta = delta.to(dy.dtype)
    if dim == "out":
        return dx.addmm_(take(dy, index), delta)
    return _add_at(dx, dy, delta, index)


def linear_plus_slice(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_slice: Tensor, delta: Tensor
) -> Tensor:
    """y = x Wᵀ + b + x_slice deltaᵀ: `linear` and `slice_linear_` of an in-slice.

    x (M, K), weight (N, K), bias (N,), x_slice = x[:, index] (M, R), delta (N, R).
    """
    return slice_linear_(linear(x, weight, bias), x_slice, delta, None, "in")


def linear_dx_plus_slice(dy: Tensor, weight: Tensor, dy_slice: Tensor, delta: Tensor) -> Tensor:
    """dx = dy W + dy_slice delta: `linear_dx` and `slice_linear_dx_` of an out-slice.

    dy (M, N), weight (N, K), dy_slice = dy[:, index] (M, R), delta (R, K).
    """
    return linear_dx(dy, weight).addmm_(dy_slice, delta.to(dy.dtype))


def take(x: Tensor, index: Index) -> Tensor:
    """x[:, index] as a compact copy (M, R): a view would keep the whole of x alive."""
    if isinstance(index, slice):
        return x.narrow_copy(1, index.start, index.stop - index.start)
    return x.index_select(1, index)


def like_tokens(y: Tensor, shape: torch.Size) -> Tensor:
    """y (M, N), which nobody else holds, as (..., N) for tokens of that shape (..., K).

    It is no view for autograd: what a Function returns as one must not be written to in place. Nor
    is y resized, which what records operations could not repeat.
    """
    return y if len(shape) == 2 else _unsafe_view(y, (*shape[:-1], y.shape[-1]))


def _add_at(out: Tensor, a: Tensor, b: Tensor, index: Index) -> Tensor:
    """out[:, index] += a @ b, in place."""
    if isinstance(index, slice):
        out.narrow(1, index.start, index.stop - index.start).addmm_(a, b)
        return out
    return out.index_add_(1, index, a @ b)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
