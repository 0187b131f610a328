"""Bytes and FLOPs of the ops of `s2kernels.reference` and of torch, and what a GPU does a second.

They are what any program for the same result has to move and to multiply: every operand is read
once, every result written once. A multiplication and an addition are two FLOPs. The sizes are those
of the reference: M tokens, weight (N, K), R channels.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.measure.memory import dense_parts
from s2kernels.reference import Index
from s2kernels.update import Update

SECTOR = 32  # bytes that a GPU reads or writes at least, of a weight with scattered entries


@dataclass(frozen=True)
class Work:
    bytes: int
    flops: int


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of a large matrix product by dtype, and bytes/s read and written by a large copy.

    A dtype that is not in flops has the rate of bfloat16.
    """

    name: str
    flops: dict[str, float]
    bytes: float

    def rate(self, dtype: str) -> float:
        return self.flops.get(dtype, self.flops["bfloat16"])

    def seconds(self, flops: int, nbytes: int, dtype: str) -> float:
        return max(flops / self.rate(dtype), nbytes / self.bytes)


# H200 in bf16: measured on one, for an 8192³ product of random numbers and for a copy. Its
# fp32 and the A100 (80 GB) are the peaks of the data sheets, which real kernels do not reach.
GPUS = {
    "H200": Ceilings("H200", {"bfloat16": 790e12, "float32": 67e12}, 4.3e12),
    "A100": Ceilings("A100", {"bfloat16": 312e12, "float32": 19.5e12}, 2.04e12),
}


def size(x: Tensor) -> int:
    """Bytes of x, those that are there: of an expanded tensor few, of a sparse one its entries."""
    return sum(min(part.nbytes, part.untyped_storage().nbytes()) for part in dense_parts(x))


# Their parameters are those of the op of the same name in `s2kernels.reference`.


def linear(x, weight, bias=None) -> Work:
    k, n = x.shape[-1], len(weight)
    m = math.prod(x.shape[:-1])
    biases = 0 if bias is None else size(bias)
    return Work(_numbers(x, m * k + n * k + m * n) + biases, 2 * m * n * k)


def linear_dx(dy, weight) -> Work:
    return linear(dy, weight.t())


def slice_grad(dy, x, index, dim, out=None) -> Work:
    narrow, wide = (x, dy) if dim == "in" else (dy, x)
    (m, p), r = wide.shape, count(narrow, index)
    result = 4 * p * r
    if isinstance(out, Update):  # a step of AdamW: values and moments, and the slice of the weight
        result = 2 * _sizes((out.values, out.exp_avg, out.exp_avg_sq))
        if out.slice is not None:
            weight, base, where, dim = out.slice
            result += slice_write([weight], [base], [None], [where], [dim]).bytes
    elif out is not None:
        result = 2 * size(out)  # read and written
    return Work(_numbers(x, m * (p + r)) + result, 2 * m * p * r)


def slice_grad_each(dy, x, offsets, index, dim, out) -> Work:
    (m, p), r = (dy.shape, out.shape[2]) if dim == "in" else (x.shape, out.shape[1])
    return Work(_numbers(x, m * (p + r)) + 2 * size(out), 2 * m * p * r)


def swiglu(gate, up) -> Work:
    return Work(3 * size(gate), 5 * gate.numel())


def swiglu_bwd(dh, gate, up, index=None, out=None) -> Work:
    m, k = dh.shape
    r = 0 if index is None else count(gate, index)
    moved = 5 * k + r if k else 3 * r  # with no dh, the slice of h is all that is made
    return Work(_numbers(gate, m * moved), m * (12 * k + 5 * r))


def linear_dx_swiglu_bwd(dy, weight, gate, up, index=None, out=None) -> Work:
    dense, rest = linear_dx(dy, weight), swiglu_bwd(gate, gate, up, index)
    # dh, between the two, is neither written nor read.
    return Work(dense.bytes + rest.bytes - 2 * size(gate), dense.flops + rest.flops)


def slice_write(weights, base_slices, deltas, indices, dims) -> Work:
    """Scattered columns are written by the sector, which is read before where others stay."""
    moved = _sizes(base_slices) + _sizes(deltas)
    for weight, base, index, dim in zip(weights, base_slices, indices, dims, strict=True):
        if isinstance(index, slice) or dim == "out":
            moved += size(base)
        else:
            moved += len(weight) * sectors(index, weight.element_size())
    return Work(moved, sum(base.numel() for base in base_slices))


def sectors(index: Tensor, itemsize: int) -> int:
    """Bytes of a row that are read or written where its columns at `index` are overwritten."""
    per_sector = SECTOR // itemsize
    _, filled = (index.long() // per_sector).unique(return_counts=True)
    return SECTOR * (len(filled) + int((filled < per_sector).sum()))


def slice_linear_(y, x, delta, index, dim) -> Work:
    m, (c, d) = len(x), delta.shape  # in: R channels of x into (M, c); out: x (M, d) into R of y
    return Work(_numbers(x, m * (d + 2 * c)) + size(delta), 2 * m * c * d)


def slice_linear_dx_(dx, dy, delta, index, dim) -> Work:
    return slice_linear_(dx, dy, delta.t(), index, dim)


def linear_plus_slice(x, weight, bias, x_slice, delta) -> Work:
    dense, (m, r) = linear(x, weight, bias), x_slice.shape
    return Work(dense.bytes + _sizes((x_slice, delta)), dense.flops + 2 * m * r * len(weight))


def linear_dx_plus_slice(dy, weight, dy_slice, delta) -> Work:
    return linear_plus_slice(dy, weight.t(), None, dy_slice, delta)


def sparse_write(weights, base, delta, index) -> Work:
    """A sector of the weight is read and written for each entry."""
    entries = sum(each.numel() for each in index)
    moved = _sizes(base) + _sizes(delta or ()) + _sizes(index) + 2 * SECTOR * entries
    return Work(moved, entries)


def sparse_grad(dy, x, index, plan=None, grad=None) -> Work:
    """Of all N K sums, which is what tensor cores compute; the entries need a share of them."""
    (m, n), k = dy.shape, x.shape[1]
    return Work(_numbers(x, m * (n + k)) + 12 * index.numel(), 2 * m * n * k)


def growth_candidates(dy, x, k) -> Work:
    (m, n), columns = dy.shape, x.shape[1]
    return Work(_numbers(x, m * (n + columns)) + 4 * k, 2 * m * n * columns)


def sm3_update(row, col, index, grad) -> Work:
    return Work(8 * index.numel() + size(index) + 2 * _sizes((row, col)), 4 * index.numel())


def sm3_growth(row, col, index, k) -> Work:
    return Work(_sizes((row, col)) + size(index) + 4 * k, len(row) * len(col))


OPS: dict[str, Callable[..., Work]] = {
    op.__name__: op
    for op in (
        *(linear, linear_dx, linear_plus_slice, linear_dx_plus_slice, linear_dx_swiglu_bwd),
        *(slice_grad, slice_grad_each, slice_write, slice_linear_, slice_linear_dx_),
        *(swiglu, swiglu_bwd),
        *(sparse_write, sparse_grad, growth_candidates, sm3_update, sm3_growth),
    )
}
# Ops without a matrix product. Their FLOPs are not counted in a step.
POINTWISE = {"swiglu", "swiglu_bwd", "slice_write", "sparse_write", "sm3_update", "sm3_growth"}


def count(x: Tensor, index: Index | None) -> int:
    """How many columns of x `index` names; None for all."""
    if index is None:
        return x.shape[1]
    return index.stop - index.start if isinstance(index, slice) else index.shape[-1]


def _numbers(like: Tensor, count: int) -> int:
    return count * like.element_size()


def _sizes(tensors: Iterable[Tensor | None]) -> int:
    return sum(size(tensor) for tensor in tensors if tensor is not None)


# The operators of torch

aten = torch.ops.aten


def _attention(products: int) -> Callable[..., int]:
    """FLOPs of so many products of attention, at or below the diagonal."""

    def flops(*shapes, out_val=None, **kwargs) -> int:
        batch, heads, length, head_dim = shapes[0 if products == 2 else 1]  # q; dy comes first
        return products * batch * heads * length * (length + 1) * head_dim

    return flops


# They take shapes. Torch has none for addmm_, and those for attention count the masked half, too.
# The backward of attention makes the scores anew.
FORMULAS = {
    aten.addmm_: lambda c, a, b, *args, **kwargs: 2 * math.prod(a) * b[-1],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention(2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention(5),
}

# They only take memory or describe it in another way.
_IDLE = {
    *(aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided),
    *(aten._unsafe_view, aten.lift_fresh, aten.resize_, aten.set_, aten._local_scalar_dense),
}
# They write to their first argument and do not read it.
_OVERWRITING = {aten.copy_, aten.zero_, aten.fill_, aten.normal_, aten.uniform_}
_LOOKING_UP = {aten.index_select, aten.index, aten.gather, aten.embedding, aten.take}


def moved(func, args, kwargs, tensors: list[Tensor], results: list[Tensor]) -> int:
    """Bytes that an operator reads and writes: its operands and its results, once each."""
    op = func.overloadpacket
    if op in _IDLE:
        return 0
    if op in _LOOKING_UP:  # the table is read where it is looked at
        return _sizes(tensors[1:]) + 2 * _sizes(results)
    if op is aten.embedding_dense_backward:  # zeros, and the rows that are there added
        return 2 * size(tensors[0]) + size(tensors[1]) + size(results[0])
    if op is aten.nll_loss_forward:  # a number of every row
        return tensors[1].numel() * (tensors[0].itemsize + tensors[1].itemsize)
    if op is aten.nll_loss_backward:
        return size(results[0]) + size(tensors[2])
    if op in (aten.index_put_, aten.index_add_, aten.index_copy_):  # rows of the values' size
        return _sizes(tensors[1:]) + 2 * size(tensors[-1])
    if op is aten._fused_adamw_:  # parameter and two averages are read and written
        parameters, gradients, *_ = args
        return _sizes(gradients) + 6 * _sizes(parameters)
    nbytes = _sizes({id(x): x for x in tensors}.values()) + _sizes(results)
    written = [*tensors[:1]] if op in _OVERWRITING or kwargs.get("beta") == 0 else []
    written += [x for name in ("out", "grad_input") if (x := kwargs.get(name)) is not None]
    return nbytes - _sizes(written)
