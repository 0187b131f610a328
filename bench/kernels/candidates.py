"""What the tuner measures: ops at the shapes of real models, and the launches to try.

Sizes: M tokens, N out_features, K in_features, R trained channels, P the wide side of slice_grad.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from bench.kernels.chips import TARGETS
from bench.kernels.ops import CASES, Operands, Sizes
from bench.methods import comparable
from bench.steps.model_shapes import TABLE
from s2kernels import kernels, reference

Launch = dict[str, int]

MODELS = ("llama-2-7b", "llama-2-13b", "llama-3-8b")
# Budgets, the most usual one first: as many parameters as LoRA of a rank, or a share of all.
BUDGETS: tuple[dict, ...] = ({"rank": 16}, {"share": 0.01}, {"rank": 32})
SLICE_TOKENS = (512, 2048, 4096)
# The most telling ones first: a budget may end anywhere. Those between powers of two show whether a
# win at both ends holds where tiles fit less well.
TOKENS = (4096, 512, 2048, 8192, 1024, 16384, 3072, 768, 6144, 1536, 12288)
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
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {dtype} {self.sizes[0]}x{self.sizes[1]} M={self.tokens}"

    def operands(self, device: torch.device) -> tuple:
        """Random arguments of the op: the first call of the catalogue."""
        n, k = self.sizes
        rank = k if self.op == "slice_grad" else min(FUSED_RANK, n, k)
        case = CASES["slice_grad-in-256" if self.op == "slice_grad" else self.op]
        sizes = Sizes("tuned", self.tokens, n, k, rank)
        return next(iter(case.calls(Operands(device, self.dtype), sizes)))


def _dense_slice_grad(dy: Tensor, x: Tensor, index: None, dim: str) -> Tensor:
    """One GEMM of the BLAS with its sums in fp32, which torch offers on CUDA alone."""
    if dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return reference.slice_grad(dy, x, index, dim)


# The ops, each with what it is compared with: what would run without the kernel. slice_grad comes
# first: the kernel always runs there, as torch has no sum into the gradient.
PEERS: dict[str, Callable] = {
    "slice_grad": _dense_slice_grad,
    "linear": reference.linear,
    "linear_dx": reference.linear_dx,
    "linear_dx_swiglu_bwd": lambda dy, weight, *others: kernels.swiglu_bwd(
        reference.linear_dx(dy, weight), *others
    ),
    "linear_plus_slice": reference.linear_plus_slice,
    "linear_dx_plus_slice": reference.linear_dx_plus_slice,
}


def problems(ops: list[str], toy: bool) -> list[Problem]:
    """Those of `ops`: slice_grad, then the most telling numbers of tokens first."""
    if toy:
        return [Problem(op, (64, 48), tokens, torch.float16) for tokens in (32, 80) for op in ops]
    slices = [(sizes, tokens) for sizes in slice_sizes() for tokens in SLICE_TOKENS]
    first = [Problem("slice_grad", *each, torch.bfloat16) for each in slices if "slice_grad" in ops]
    return first + [
        Problem(op, sizes, tokens, torch.bfloat16)
        for tokens in TOKENS
        for op in ops
        if op != "slice_grad"
        for sizes in weight_sizes(op)
    ]


def slice_sizes() -> list[tuple[int, int]]:
    """(P, R) of o_proj and down_proj that the budgets give in the models."""
    found = []
    for given, model in product(BUDGETS, MODELS):
        shape = TABLE[model]
        budget = comparable(shape.config(1), **given)
        found += [(shape.hidden, budget.heads * shape.head_dim), (shape.hidden, budget.channels)]
    return list(dict.fromkeys(found))


def weight_sizes(op: str) -> list[tuple[int, int]]:
    """(N, K) of the models' linear layers, and of those that are joined for a dense product."""
    found = set()
    for linears in (TABLE[model].linears() for model in MODELS):
        found |= {linears["down_proj"]} if op == "linear_dx_swiglu_bwd" else {*linears.values()}
        if op in ("linear", "linear_dx"):
            for first, second in (("gate_proj", "up_proj"), ("q_proj", "k_proj")):
                found.add((linears[first][0] + linears[second][0], linears[first][1]))
    return sorted(found)


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
    (64, 128, 64, 8, 3),
    (64, 256, 64, 8, 4),
)
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


def candidates(problem: Problem, toy: bool) -> list[Launch]:
    """The launches to try; the empty one stands for the default beside the kernel."""
    tried = _slice_grad(problem, toy) if problem.op == "slice_grad" else _dense(problem, toy)
    return [{}, *tried]


def _dense(problem: Problem, toy: bool) -> list[Launch]:
    shared = TARGETS["sm_90"].shared_bytes  # for the stages and a tile on its way out; sm_100's too
    launches = []
    for m, c, d, programs, warps, stages in ((16, 64, 16, 1, 4, 2),) if toy else _DENSE:
        launch = dict(BLOCK_M=m, BLOCK_C=c, BLOCK_D=d, GROUP_M=8, PROGRAMS=programs)
        launch |= dict(num_warps=warps, num_stages=stages)
        if problem.op == "linear_dx_swiglu_bwd":
            launches.append(launch)
            continue
        launches.append(launch | {"HALVES": True})
        if 2 * ((m + c) * d * stages + m * c) <= shared // programs:
            launches.append(launch | {"HALVES": False})
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
