"""Frozen weights of one operand x (M, K): one GEMM where they lie one after the other in memory.

    yᵢ = x Wᵢᵀ + bᵢ        dx = dy₁ W₁ + dy₂ W₂ + ...

Wᵢ (Nᵢ, K). Joined weights are views of one storage, (N₁ + N₂ + ..., K), in which each keeps its
rows: their names, what writes into them and what permutes them in place know nothing of it. With
few tokens the yᵢ of joined weights are views of one (M, N₁ + N₂ + ...), and keep all of it alive.
With many tokens each yᵢ is a product and a tensor of its own: see
`s2kernels.backend.prefers_joined_outputs`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from s2kernels import backend
from s2kernels.autograd.first_order import apply, cast, first_order
from s2kernels.autograd.linear import as_tokens, like_tokens


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


class Run(NamedTuple):
    """Weights that are one GEMM: `whole` (sum of Nᵢ, K), their biases, and their Nᵢ."""

    whole: Tensor
    biases: tuple[Tensor | None, ...]
    sizes: list[int]


def runs_of(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Run]:
    """The weights (Nᵢ, K) and biases (Nᵢ,) as the fewest GEMMs.

    Weights that follow one another in one storage are one, where all of them have a bias or none
    has.
    """
    runs: list[Run] = []
    start = 0
    while start < len(weights):
        for stop in range(len(weights), start, -1):
            part, its_biases = weights[start:stop], tuple(biases[start:stop])
            alike = len({bias is None for bias in its_biases}) == 1
            whole = part[0] if len(part) == 1 else joined(*part) if alike else None
            if whole is not None:
                runs.append(Run(whole, its_biases, [len(weight) for weight in part]))
                break
        start = stop
    return runs


def joined_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    runs: Sequence[Run],
    holding: AbstractContextManager | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """The outputs (..., Nᵢ) of frozen linear layers of x (..., K), for a caller that has checked.

    weights (Nᵢ, K), and `runs_of` them and their frozen biases, in the dtype of x (autocast casts
    all). The backward runs inside `holding`. It saves the weights alone. Gradient: x.
    """
    return apply(JoinedLinearFunction, x, runs, holding, impl, *weights)


class JoinedLinearFunction(torch.autograd.Function):
    """yᵢ (..., Nᵢ) from x (..., K); see `joined_linear`."""

    @staticmethod
    def forward(ctx, x, runs, holding, impl, *weights):
        shape, x = x.shape, as_tokens(x)
        ops = backend.select(x, impl)
        ctx.set_materialize_grads(False)  # an output that is not used costs no GEMM
        ctx.save_for_backward(*(weights if ctx.needs_input_grad[0] else ()))
        ctx.holding, ctx.impl = holding if ctx.needs_input_grad[0] else None, impl
        ys = []
        for whole, biases, sizes in runs:
            if len(sizes) > 1 and backend.prefers_joined_outputs(x, whole):
                y = like_tokens(project(ops, x, whole, *biases), shape)
                ys += y.split_with_sizes(sizes, -1)
            else:
                for weight, bias in zip(whole.split(sizes), biases, strict=True):
                    ys.append(like_tokens(project(ops, x, weight, bias), shape))
        return tuple(ys)

    @staticmethod
    @first_order
    def backward(ctx, *dys):
        dx = shape = None
        for dy, weight in zip(dys, ctx.saved_tensors, strict=True):
            if dy is not None:
                shape, dy = dy.shape, dy.reshape(-1, dy.shape[-1])
                dx = add_dx(backend.select(dy, ctx.impl), dx, dy, weight)
        dx = None if dx is None else dx.view(*shape[:-1], dx.shape[-1])
        return dx, *[None] * (3 + len(dys))


def project(ops, x: Tensor, weight: Tensor, *biases: Tensor | None) -> Tensor:
    """y = x Wᵀ + b, (M, N), for W (N, K), and b the biases one after the other, or none if None."""
    weight = cast(weight, x.dtype)
    if biases[0] is None:
        return ops.linear(x, weight)
    given = [cast(bias, x.dtype) for bias in biases if bias is not None]
    return ops.linear(x, weight, given[0] if len(given) == 1 else torch.cat(given))


def add_dx(ops, dx: Tensor | None, dy: Tensor, weight: Tensor) -> Tensor:
    """dx + dy W in place, or dy W where there is no dx yet; dy (M, N), weight (N, K)."""
    weight = cast(weight, dy.dtype)
    if dx is None:
        return ops.linear_dx(dy, weight)
    return dx.addmm_(dy, weight)  # torch's whatever ops: no kernel of ours adds a dense product
