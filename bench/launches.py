"""Launches of every kernel at a real model's shapes, for the compiler alone: meta tensors, no GPU.

A case calls a public launcher; `bench.compiler` records what it would launch and compiles that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch


@dataclass(frozen=True)
class Sizes:
    """Tokens, hidden size and FFN size of a model."""

    M: int
    hidden: int
    ffn: int


# Those of LLaMA-2-7B, and the same with no alignment left, which makes other code.
SIZES = {"7b": Sizes(8192, 4096, 11008), "ragged": Sizes(8191, 4097, 11009)}

Launch = Callable[[ModuleType, torch.dtype, Sizes], None]


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _index(size: int) -> torch.Tensor:
    return _empty(size, dtype=torch.int32)


def _linear(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    x, weight = _empty(s.M, s.hidden, dtype=dtype), _empty(s.ffn, s.hidden, dtype=dtype)
    kernels.linear(x, weight)
    kernels.linear(x, weight, _empty(s.ffn, dtype=dtype))
    kernels.linear(x[:1], weight)  # one token is no tensor to Triton, but the number 1


def _linear_dx(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    kernels.linear_dx(_empty(s.M, s.ffn, dtype=dtype), _empty(s.ffn, s.hidden, dtype=dtype))


def _plus_slice(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    fused = _fused_linear()
    x, dy = _empty(s.M, s.hidden, dtype=dtype), _empty(s.M, s.ffn, dtype=dtype)
    weight, bias = _empty(s.ffn, s.hidden, dtype=dtype), _empty(s.ffn, dtype=dtype)
    part, delta = _empty(s.M, 256, dtype=dtype), _empty(s.ffn, 256, dtype=torch.float32)
    fused.linear_plus_slice(x, weight, bias, part, delta)
    delta = _empty(256, s.hidden, dtype=torch.float32)
    fused.linear_dx_plus_slice(dy, weight, part, delta)


def _linear_dx_swiglu_bwd(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    dy, weight = _empty(s.M, s.hidden, dtype=dtype), _empty(s.hidden, s.ffn, dtype=dtype)
    gate, up = (_empty(s.M, s.ffn, dtype=dtype) for _ in range(2))
    fused = _fused_linear()
    fused.linear_dx_swiglu_bwd(dy, weight, gate, up, slice(0, 256))
    fused.linear_dx_swiglu_bwd(dy[:1], weight, gate[:1], up[:1], slice(0, 256))


def _fused_linear() -> ModuleType:
    from s2kernels.kernels import fused_linear

    return fused_linear


def _slice_grad(dim: str, R: int) -> Launch:
    def launch(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
        dy, x = _empty(s.M, s.hidden, dtype=dtype), _empty(s.M, s.ffn, dtype=dtype)
        compact = _empty(s.M, R, dtype=dtype)
        kernels.slice_grad(*((dy, compact) if dim == "in" else (compact, x)), None, dim)
        kernels.slice_grad(dy, x, _index(R), dim)
        # Few tokens: no split, and the sum goes straight into the gradient.
        grad = _empty(*((s.hidden, R) if dim == "in" else (R, s.ffn)), dtype=torch.float32)
        kernels.slice_grad(dy[:64], x[:64], slice(256, 256 + R), dim, grad)

    return launch


def _slice_grad_each(dim: str, R: int) -> Launch:
    def launch(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
        dy, x = _empty(s.M, s.hidden, dtype=dtype), _empty(s.M, s.ffn, dtype=dtype)
        offsets = _index(EXPERTS)
        grads = _empty(*((s.hidden, R) if dim == "in" else (R, s.ffn)), dtype=torch.float32)
        grads = grads.expand(EXPERTS, -1, -1).contiguous()
        compact = _empty(s.M, R, dtype=dtype)
        operands = (dy, compact) if dim == "in" else (compact, x)
        kernels.slice_grad_each(*operands, offsets, None, dim, grads)
        index = _empty(EXPERTS, R, dtype=torch.int32)
        kernels.slice_grad_each(dy, x, offsets, index, dim, grads)

    return launch


def _swiglu(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    kernels.swiglu(_empty(s.M, s.ffn, dtype=dtype), _empty(s.M, s.ffn, dtype=dtype))


def _swiglu_bwd(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    args = [_empty(s.M, s.ffn, dtype=dtype) for _ in range(3)]
    for index in (None, slice(0, 256), _index(256)):
        kernels.swiglu_bwd(*args, index)


def _slice_linear(op: str, dim: str, R: int) -> Launch:
    def launch(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
        delta = _empty(*((s.hidden, R) if dim == "in" else (R, s.ffn)), dtype=torch.float32)
        result, operand = _empty(s.M, s.hidden, dtype=dtype), _empty(s.M, s.ffn, dtype=dtype)
        if op == "slice_linear_dx_":
            result, operand = operand, result
        for index in (slice(0, R), _index(R)):
            getattr(kernels, op)(result, operand, delta, index, dim)

    return launch


def _slice_write(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    # Its table holds addresses, of which meta tensors have none; the sizes do not matter.
    R, odd = 16, s.hidden % 16
    weight = torch.empty((64, 64 + odd), dtype=dtype)
    shapes = [(64, R), (R, 64 + odd)]
    base = [torch.empty(shape, dtype=dtype) for shape in shapes]
    delta = [torch.empty(shape) for shape in shapes]
    for index in (slice(0, R), torch.arange(R, dtype=torch.int32)):
        kernels.slice_write([weight, weight], base, delta, [index, index], ["in", "out"])


def _sparse_write(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    weight, index = torch.empty((64, 64), dtype=dtype), torch.arange(100, dtype=torch.int32)
    base, delta = torch.empty(100, dtype=dtype), torch.empty(100)
    kernels.sparse_write([weight], [base], [delta], [index])
    kernels.sparse_write([weight.t()], [base], None, [index.long()])


def _sparse_grad(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    from s2kernels.plan import TilePlan

    k = s.hidden * s.ffn // 100
    places = _empty(k, dtype=torch.int16)
    dy, x, index = _empty(s.M, s.hidden, dtype=dtype), _empty(s.M, s.ffn, dtype=dtype), _index(k)
    for num_tiles, grad in ((1376, None), (1376, _empty(k, dtype=torch.float32)), (100, None)):
        plan = TilePlan(
            (s.hidden, s.ffn), _index(num_tiles), _index(num_tiles + 1), _index(k), places
        )
        kernels.sparse_grad(dy, x, index, plan, grad)


def _growth_passes(look, programs: int) -> None:
    from s2kernels.kernels.score_search import BINS, Bounds, Buffers

    counts, found = (
        torch.empty((programs, BINS), dtype=torch.int32),
        torch.empty((), dtype=torch.int64),
    )
    keys, positions = torch.empty(100, dtype=torch.int32), torch.empty(100, dtype=torch.int64)
    for rows in (False, True):
        look(Buffers(counts), Bounds(0, 20, 2048), COLLECT=False, ROWS=rows)
    look(Buffers(None, keys, positions, found), Bounds(capacity=100), COLLECT=True, ROWS=False)


def _growth_candidates(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    # The passes that the launcher makes depend on what the one before them counted.
    from s2kernels.kernels.sparse_growth import candidate_passes

    dy, x = _empty(s.M, s.hidden, dtype=dtype), _empty(s.M, s.ffn, dtype=dtype)
    _growth_passes(*candidate_passes(dy, x))


def _sm3(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    from s2kernels.kernels.sparse_growth import product_passes

    # Not of the meta device: the plan of an index depends on its content.
    row, col, index = (
        torch.empty(s.hidden),
        torch.empty(s.ffn),
        torch.arange(100, dtype=torch.int32),
    )
    kernels.sm3_update(row, col, index, torch.empty(100))
    _growth_passes(*product_passes(row, col, index))


def _adamw(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    flat = [_empty(s.hidden * 256, dtype=torch.float32) for _ in range(3)]
    kernels.adamw_values_(*flat, _empty(3, dtype=torch.float32), 1e-8)


EXPERTS = 8  # of a mixture
_WIDTHS = (16, 32, 64, 256)  # each of the blocks that a slice of R channels can get

CASES: dict[str, Launch] = {
    "linear": _linear,
    "linear_dx": _linear_dx,
    "plus_slice": _plus_slice,
    "linear_dx_swiglu_bwd": _linear_dx_swiglu_bwd,
    # a single channel is no tensor to Triton, but the number 1
    **{f"slice_grad-{d}-{R}": _slice_grad(d, R) for d in ("in", "out") for R in (1, *_WIDTHS)},
    # the same code for both dimensions, but for strides
    **{f"slice_grad_each-in-{R}": _slice_grad_each("in", R) for R in (1, *_WIDTHS)},
    "slice_grad_each-out-256": _slice_grad_each("out", 256),
    **{
        f"{op}-{d}-{R}": _slice_linear(op, d, R)
        for op, scattering in (("slice_linear_", "out"), ("slice_linear_dx_", "in"))
        for d in ("in", "out")
        for R in (_WIDTHS if d == scattering else (256,))
    },
    "swiglu": _swiglu,
    "swiglu_bwd": _swiglu_bwd,
    "slice_write": _slice_write,
    "sparse_write": _sparse_write,
    "sparse_grad": _sparse_grad,
    "growth_candidates": _growth_candidates,
    "sm3": _sm3,
    "adamw": _adamw,
}
