"""Frozen weights of one operand x (M, K): one GEMM where they lie one after the other in memory.

    yᵢ = x Wᵢᵀ + bᵢ        dx = dy₁ W₁ + dy₂ W₂ + ...

Wᵢ (Nᵢ, K). Joined weights are views of one storage, (N₁ + N₂ + ..., K), in which each keeps its
rows: their names, what writes into them and what permutes them in place know nothing of it.
"""

import torch
from torch import Tensor, nn

from s2kernels.autograd.first_order import cast


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
