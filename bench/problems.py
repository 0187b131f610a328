"""What bench.tune measures: the ops at the shapes of real models, and the launches to try.

Sizes: M tokens, N out_features, K in_features, R trained channels, P the wide side of slice_grad.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from bench.steps import model_shapes as shapes
from s2kernels import kernels, reference
from s2kernels.kernels import fused_linear

Launch = dict[str, int]
Results = tuple[Tensor, ...]

MODELS = ("llama-2-7b", "llama-2-13b", "llama-3-8b")
# The most telling ones first: a budget may end anywhere. Those between powers of two show whether a
# win at both ends holds where tiles fit less well.
TOKENS = (4096, 512, 2048, 8192, 1024, 16384, 3072, 768, 6144, 1536, 12288)
RANKS = (64, 128, 256, 512)
FUSED_RANK = 256


@dataclass(frozen=True)
class Problem:
    """An op at one shape. sizes: (N, K) of the weight, for slice_grad (P, R)."""

    op: str
    sizes: tuple[int, int]
    tokens: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        first, second = "PR" if self.op == "slice_grad" else "NK"
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{first}={self.sizes[0]} {second}={self.sizes[1]}"
        return f"{self.op} {dtype} {sizes} M={self.tokens}"


@dataclass(frozen=True)
class Op:
    """operands: from (problem, randn) the arguments of the other three.

    triton, torch: the two that are compared; exact: the same in plain torch, given fp64 operands.
    """

    operands: Callable[[Problem, Callable[..., Tensor]], tuple]
    triton: Callable[..., Results]
    torch: Callable[..., Results]
    exact: Callable[..., Results]


def _x_weight(p: Problem, randn) -> tuple:
    return randn(p.tokens, p.sizes[1]), randn(*p.sizes)


def _dy_weight(p: Problem, randn) -> tuple:
    return randn(p.tokens, p.sizes[0]), randn(*p.sizes)


def _x_slice(p: Problem, randn) -> tuple:
    rank = min(FUSED_RANK, p.sizes[1])
    return *_x_weight(p, randn), randn(p.tokens, rank), randn(p.sizes[0], rank)


def _dy_slice(p: Problem, randn) -> tuple:
    rank = min(FUSED_RANK, p.sizes[0])
    return *_dy_weight(p, randn), randn(p.tokens, rank), randn(rank, p.sizes[1])


def _dy_gate_up(p: Problem, randn) -> tuple:
    gate, up = randn(p.tokens, p.sizes[1]), randn(p.tokens, p.sizes[1])
    return *_dy_weight(p, randn), gate, up


def _wide_slice(p: Problem, randn) -> tuple:
    return randn(p.tokens, p.sizes[0]), randn(p.tokens, p.sizes[1])


def _slice_grad_torch(dy: Tensor, x: Tensor) -> Results:
    """One GEMM of the BLAS with its sums in fp32, which torch offers on CUDA alone."""
    if dy.is_cuda:
        return (torch.mm(dy.t(), x, out_dtype=torch.float32),)
    return (reference.slice_grad(dy, x, None, "in"),)


def _plus_slice(x: Tensor, weight: Tensor, part: Tensor, delta: Tensor) -> Results:
    return (reference.slice_linear_(reference.linear(x, weight), part, delta, None, "in"),)


def _dx_plus_slice(dy: Tensor, weight: Tensor, part: Tensor, delta: Tensor) -> Results:
    return (reference.linear_dx(dy, weight).addmm_(part, delta),)


OPS = {
    "linear": Op(
        _x_weight,
        lambda x, weight: (kernels.linear(x, weight),),
        lambda x, weight: (reference.linear(x, weight),),
        lambda x, weight: (reference.linear(x, weight),),
    ),
    "linear_dx": Op(
        _dy_weight,
        lambda dy, weight: (kernels.linear_dx(dy, weight),),
        lambda dy, weight: (reference.linear_dx(dy, weight),),
        lambda dy, weight: (reference.linear_dx(dy, weight),),
    ),
    "slice_grad": Op(
        _wide_slice,
        lambda dy, x: (kernels.slice_grad(dy, x, None, "in"),),
        _slice_grad_torch,
        lambda dy, x: (reference.slice_grad(dy, x, None, "in"),),
    ),
    # Against what runs otherwise: cuBLAS, and for SwiGLU the kernel of its own.
    "linear_dx_swiglu_bwd": Op(
        _dy_gate_up,
        lambda *args: fused_linear.linear_dx_swiglu_bwd(*args)[:2],
        lambda dy, w, gate, up: kernels.swiglu_bwd(reference.linear_dx(dy, w), gate, up)[:2],
        lambda dy, w, gate, up: reference.swiglu_bwd(reference.linear_dx(dy, w), gate, up)[:2],
    ),
    "linear_plus_slice": Op(
        _x_slice,
        lambda x, weight, *part: (fused_linear.linear_plus_slice(x, weight, None, *part),),
        _plus_slice,
        _plus_slice,
    ),
    "linear_dx_plus_slice": Op(
        _dy_slice,
        lambda *args: (fused_linear.linear_dx_plus_slice(*args),),
        _dx_plus_slice,
        _dx_plus_slice,
    ),
}


def problems(ops: list[str], toy: bool) -> list[Problem]:
    """Those of `ops`, the most telling numbers of tokens first."""
    if toy:
        return [Problem(op, (64, 48), tokens, torch.float16) for tokens in (32, 80) for op in ops]
    listed = [
        Problem(op, sizes, tokens, torch.bfloat16)
        for tokens in TOKENS
        for op in ops
        for sizes in _sizes(op)
    ]
    # slice_grad at powers of two: no range is made of its results.
    return [p for p in listed if p.op != "slice_grad" or p.tokens.bit_count() == 1]


def _sizes(op: str) -> list[tuple[int, int]]:
    layers = [shapes.TABLE[model].linears() for model in MODELS]
    if op == "slice_grad":
        wide = {n for linears in layers for n in linears["down_proj"]}
        return list(product(sorted(wide), RANKS))
    if op == "linear_dx_swiglu_bwd":
        return sorted({linears["down_proj"] for linears in layers})
    return sorted({sizes for linears in layers for sizes in linears.values()})


_SHARED_BYTES = 227 * 1024  # of a block of sm_90 and sm_100; stages and a tile on its way out
# (BLOCK_M, BLOCK_C, BLOCK_D, PROGRAMS, num_warps, num_stages) of the dense products. Of two
# programs of one multiprocessor, one multiplies while the other stores.
_DENSE = (
    (128, 256, 64, 1, 8, 3),
    (128, 256, 64, 1, 8, 4),
    (256, 128, 64, 1, 8, 3),
    (256, 128, 64, 1, 8, 4),
    (128, 128, 64, 1, 8, 4),
    (128, 128, 64, 1, 4, 4),
    (128, 128, 64, 2, 4, 3),
    (128, 128, 128, 1, 8, 3),
    (64, 256, 64, 1, 4, 4),
    (64, 128, 128, 1, 4, 4),
    (64, 128, 64, 2, 4, 4),
)
# (BLOCK_M, BLOCK_P, largest BLOCK_R, num_warps, num_stages) of slice_grad.
_SLICE_GRAD = (
    (64, 128, 128, 8, 3),
    (64, 128, 128, 8, 4),
    (64, 128, 64, 4, 4),
    (64, 256, 64, 8, 4),
)
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


def candidates(problem: Problem, toy: bool) -> list[Launch]:
    """The launches to try; the empty one stands for the default beside the kernel."""
    tried = _slice_grad(problem, toy) if problem.op == "slice_grad" else _dense(problem, toy)
    return [{}, *tried]


def _dense(problem: Problem, toy: bool) -> list[Launch]:
    launches = []
    for m, c, d, programs, warps, stages in ((16, 64, 16, 1, 4, 2),) if toy else _DENSE:
        launch = dict(BLOCK_M=m, BLOCK_C=c, BLOCK_D=d, GROUP_M=8, PROGRAMS=programs)
        options = dict(num_warps=warps, num_stages=stages)
        if problem.op == "linear_dx_swiglu_bwd":
            launches.append({**launch, **options})
            continue
        launches.append({**launch, "HALVES": True, **options})
        if 2 * ((m + c) * d * stages + m * c) <= _SHARED_BYTES // programs:
            launches.append({**launch, "HALVES": False, **options})
    return launches


def _slice_grad(problem: Problem, toy: bool) -> list[Launch]:
    tiles = ((16, 16, 16, 4, 2),) if toy else _SLICE_GRAD
    splits = [n for n in _SPLITS if n * 2 * tiles[0][0] <= problem.tokens]
    return [
        dict(
            BLOCK_M=m, BLOCK_P=p, BLOCK_R=r, GROUP_P=8, SPLITS=n, num_warps=warps, num_stages=stages
        )
        for (m, p, r, warps, stages), n in product(tiles, splits)
    ]
