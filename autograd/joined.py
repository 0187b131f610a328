"""Frozen weights of one operand x (M, K): one GEMM where they lie one after the other in memory.

    yᵢ = x Wᵢᵀ + bᵢ        dx = dy₁ W₁ + dy₂ W₂ + ...

Wᵢ (Nᵢ, K). Joined weights are views of one storage, (N₁ + N₂ + ..., K), in which each keeps its
rows: their names, what writes into them and what permutes them in place know nothing of it. The yᵢ
of joined weights are views of one (M, N₁ + N₂ + ...), and keep all of it alive.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from s2kernels import backend
from s2kernels.autograd.checks import without_autocast
from s2kernels.autograd.linear import as_tokens


def joined(*weights: Tensor) -> Tensor | None:
    """The weights (Nᵢ, K) as one (N₁ + N₂ + ..., K), a view, where they lie so; None elsewhere.

    None, too, where addresses tell nothing: under torch.compile, on the meta device, and for
    tensors of any other class than torch's own.
    """
    if torch.compiler.is_compiling():
        return None
    first, rows, end = weights[0], 0, None
    for weight in weights:
        if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
            return None
        start = weight.data_ptr()
        if start != end and end is not None:  # mostly so, and it is the quickest to see
            return None
        end = start + weight.nbytes
        rows += len(weight)
    same = _kind(first)
    if not all(_kind(weight) == same and weight.is_contiguous() for weight in weights):
        return None
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _kind(weight: Tensor) -> tuple:
    """What joined weights share; neighbours in other storages are so by chance."""
    return weight.dtype, weight.shape[1], weight.untyped_storage().data_ptr()


@torch.inference_mode(False)  # a weight made in it could not be saved for a backward
@torch.no_grad()
def join_(*weights: Tensor) -> None:
    """Lay the weights (Nᵢ, K) one after the other; each stays the Parameter that it is.

    It takes the memory of all of them for a moment, and none in the end: they had a storage each.
    Autograd does not notice, and has no reason to: the values are the same.

    Raises TypeError for anything but plain Parameters of one floating dtype, ValueError for those
    that are not matrices of one K, on one device other than meta, each alone in its storage.
    """
    first = weights[0]
    for weight in weights:
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            kind = f"{type(weight).__name__} of {weight.dtype}"
            raise TypeError(f"weights must be plain floating Parameters, got a {kind}")
        if weight.dtype != first.dtype:
            raise TypeError(f"weights must share a dtype, got {first.dtype} and {weight.dtype}")
        if weight.dim() != 2 or weight.shape[1] != first.shape[1]:
            shapes = [tuple(weight.shape) for weight in weights]
            raise ValueError(f"weights must be matrices of one in_features, got {shapes}")
        if weight.device != first.device or weight.is_meta:
            devices = [str(weight.device) for weight in weights]
            raise ValueError(f"weights must be on one device, and not meta, got {devices}")
    if joined(*weights) is not None:
        return
    if not all(map(is_alone, weights)):
        raise ValueError("weights must have a storage each, got one that shares its own")
    whole = first.new_empty(sum(weight.shape[0] for weight in weights), first.shape[1])
    for weight, rows in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
        rows.copy_(weight)
        weight.data = rows  # which frees what it was


def is_alone(weight: Tensor) -> bool:
    """Whether nothing else lies in the storage of weight."""
    return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


def joined_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """The outputs (..., Nᵢ) of frozen linear layers of x (..., K), for a caller that has checked.

    weights (Nᵢ, K), biases (Nᵢ,) or None, in the dtype of x (autocast casts all). Weights that
    follow one another in one storage are one GEMM, where all of them have a bias or none has.
    It saves the weights alone. Gradient: x.
    """
    ys = JoinedLinearFunction.apply(as_tokens(x), len(weights), impl, *weights, *biases)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class JoinedLinearFunction(torch.autograd.Function):
    """yᵢ (M, Nᵢ) from x (M, K); see `joined_linear`."""

    @staticmethod
    def forward(ctx, x, num, impl, *weights_and_biases):
        ops = backend.select(x, impl)
        weights, biases = weights_and_biases[:num], weights_and_biases[num:]
        ctx.set_materialize_grads(False)  # an output that is not used costs no GEMM
        ctx.save_for_backward(*(weights if ctx.needs_input_grad[0] else ()))
        ctx.impl = impl
        ys = []
        while len(ys) < num:
            rest, its_biases = weights[len(ys) :], biases[len(ys) :]
            weight, count = _first_run(rest, its_biases)
            y = project(ops, x, weight, *its_biases[:count])
            ys += [y] if count == 1 else y.split([len(part) for part in rest[:count]], 1)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        dx = None
        for dy, weight in zip(dys, ctx.saved_tensors, strict=True):
            if dy is None:
                continue
            with without_autocast(dy):
                dx = add_dx(backend.select(dy, ctx.impl), dx, dy, weight)
        return dx, *[None] * (2 + 2 * len(dys))


def project(ops, x: Tensor, weight: Tensor, *biases: Tensor | None) -> Tensor:
    """y = x Wᵀ + b, (M, N), for W (N, K), and b the biases one after the other, or none if None."""
    given = [bias.to(x.dtype) for bias in biases if bias is not None]
    bias = given[0] if len(given) == 1 else torch.cat(given) if given else None
    return ops.linear(x, weight.to(x.dtype), bias)


def add_dx(ops, dx: Tensor | None, dy: Tensor, weight: Tensor) -> Tensor:
    """dx + dy W in place, or dy W where there is no dx yet; dy (M, N), weight (N, K)."""
    weight = weight.to(dy.dtype)
    if dx is None:
        return ops.linear_dx(dy, weight)
    return dx.addmm_(dy, weight)  # torch's whatever ops: no kernel of ours adds a dense product


def _first_run(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, int]:
    """The weight of as many of the first ones as are one GEMM, and how many these are."""
    for count in range(len(weights), 1, -1):
        alike = len({bias is None for bias in biases[:count]}) == 1
        whole = joined(*weights[:count]) if alike else None
        if whole is not None:
            return whole, count
    return weights[0], 1
