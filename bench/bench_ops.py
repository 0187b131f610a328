"""Every op at the shapes of one linear layer: torch beside Triton, which needs a GPU to be timed.

Each case states in extra_info the bytes and the FLOPs that the op cannot do without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor

from bench import timing
from s2kernels import backend
from s2kernels.plan import index_dtype


@dataclass(frozen=True)
class Shape:
    """M tokens, K in_features, N out_features, R trained channels."""

    name: str
    m: int
    k: int
    n: int
    r: int

    def __str__(self) -> str:
        return f"{self.name} M={self.m}"


CPU_SHAPES = (Shape("small", 256, 704, 256, 16),)
CUDA_SHAPES = tuple(
    Shape(f"llama2-7b {layer}", m, k, 4096, 256)
    for layer, k in (("o_proj", 4096), ("down_proj", 11008))
    for m in (512, 2048, 4096, 8192)
)
CUDA = torch.cuda.is_available()
ROUNDS, ITERATIONS, WARM_UP = 20, 10, 3
SECONDS = 3.0  # of a case, where all of these calls would take longer
LEAST_ROUNDS = 3


class Operands:
    """Random operands in the dtype of the device: bf16 on a GPU, fp32 elsewhere; deltas in fp32."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device = shape, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        self.index = torch.randperm(shape.k)[: shape.r].sort().values.to(device, torch.int32)

    @cached_property
    def entries(self) -> Tensor:
        """Positions in the weight, sorted: about as many as LoRA of rank 16 has parameters.

        A little fewer, for those that are drawn twice: a permutation of all takes seconds.
        """
        size, k = self.shape.n * self.shape.k, 16 * (self.shape.n + self.shape.k)
        drawn = torch.randint(size, (k,), device=self.device).unique()
        return drawn.to(index_dtype((size, 1)))

    def randn(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*sizes, device=self.device, dtype=dtype or self.dtype)


def linear(ops, o, s):
    x, weight = o.randn(s.m, s.k), o.randn(s.n, s.k)
    size = (s.m * s.k + s.n * s.k + s.m * s.n) * o.dtype.itemsize
    return lambda: ops.linear(x, weight), size, 2 * s.m * s.n * s.k


def linear_dx(ops, o, s):
    dy, weight = o.randn(s.m, s.n), o.randn(s.n, s.k)
    size = (s.m * s.k + s.n * s.k + s.m * s.n) * o.dtype.itemsize
    return lambda: ops.linear_dx(dy, weight), size, 2 * s.m * s.n * s.k


def slice_grad(ops, o, s):
    dy, x = o.randn(s.m, s.n), o.randn(s.m, s.r)
    size = s.m * (s.n + s.r) * o.dtype.itemsize + 4 * s.n * s.r
    return lambda: ops.slice_grad(dy, x, None, "in"), size, 2 * s.m * s.n * s.r


def slice_grad_each(ops, o, s):
    """Of 8 experts, with an eighth of the tokens each."""
    dy, x = o.randn(s.m, s.n), o.randn(s.m, s.r)
    offsets = torch.arange(1, 9, device=o.device, dtype=torch.int32) * (s.m // 8)
    grads = torch.zeros(8, s.n, s.r, device=o.device)
    size = s.m * (s.n + s.r) * o.dtype.itemsize + 2 * 4 * grads.numel()
    return lambda: ops.slice_grad_each(dy, x, offsets, None, "in", grads), size, 2 * s.m * s.n * s.r


def swiglu(ops, o, s):
    gate, up = o.randn(s.m, s.k), o.randn(s.m, s.k)
    return lambda: ops.swiglu(gate, up), 3 * s.m * s.k * o.dtype.itemsize, 5 * s.m * s.k


def swiglu_bwd(ops, o, s):
    dh, gate, up = o.randn(s.m, s.k), o.randn(s.m, s.k), o.randn(s.m, s.k)
    size = s.m * (5 * s.k + s.r) * o.dtype.itemsize
    return lambda: ops.swiglu_bwd(dh, gate, up, o.index), size, 12 * s.m * s.k


def slice_write(ops, o, s):
    """32 layers by one call, as a forward of a model does it."""
    weights = [o.randn(s.n, s.k) for _ in range(32)]
    bases = [weight[:, o.index].clone() for weight in weights]
    deltas = [o.randn(s.n, s.r, dtype=torch.float32) for _ in range(32)]
    arguments = weights, bases, deltas, [o.index] * 32, ["in"] * 32
    size = 32 * s.n * s.r * (2 * o.dtype.itemsize + 4)
    return lambda: ops.slice_write(*arguments), size, 32 * s.n * s.r


def slice_linear_(ops, o, s):
    x, y, delta = o.randn(s.m, s.k), o.randn(s.m, s.n), o.randn(s.n, s.r, dtype=torch.float32)
    size = s.m * (s.r + 2 * s.n) * o.dtype.itemsize + 4 * s.n * s.r
    return lambda: ops.slice_linear_(y, x, delta, o.index, "in"), size, 2 * s.m * s.n * s.r


def slice_linear_dx_(ops, o, s):
    dy, dx, delta = o.randn(s.m, s.n), o.randn(s.m, s.k), o.randn(s.n, s.r, dtype=torch.float32)
    size = s.m * (s.n + 2 * s.r) * o.dtype.itemsize + 4 * s.n * s.r
    return lambda: ops.slice_linear_dx_(dx, dy, delta, o.index, "in"), size, 2 * s.m * s.n * s.r


def sparse_write(ops, o, s):
    """32 layers by one call; a sector of 32 bytes of the weight is read and written an entry."""
    weights = [o.randn(s.n, s.k) for _ in range(32)]
    bases = [weight.view(-1)[o.entries.long()] for weight in weights]
    deltas = [o.randn(len(o.entries), dtype=torch.float32) for _ in range(32)]
    arguments = weights, bases, deltas, [o.entries] * 32
    size = 32 * len(o.entries) * (o.dtype.itemsize + 4 + 4 + 2 * 32)
    return lambda: ops.sparse_write(*arguments), size, 32 * len(o.entries)


def sparse_grad(ops, o, s):
    """Of all N K sums, which is what tensor cores compute; the entries need a share of them."""
    dy, x, plan = o.randn(s.m, s.n), o.randn(s.m, s.k), ops.tile_plan(o.entries, (s.n, s.k))
    size = s.m * (s.n + s.k) * o.dtype.itemsize + 12 * len(o.entries)
    return lambda: ops.sparse_grad(dy, x, o.entries, plan), size, 2 * s.m * s.n * s.k


def dense_grad(ops, o, s):
    """The gradient of the whole weight by the GEMM of torch: the peer of sparse_grad."""
    dy, x = o.randn(s.m, s.n), o.randn(s.m, s.k)
    size = (s.m * (s.n + s.k) + s.n * s.k) * o.dtype.itemsize
    return lambda: dy.t() @ x, size, 2 * s.m * s.n * s.k


def growth_candidates(ops, o, s):
    dy, x, k = o.randn(s.m, s.n), o.randn(s.m, s.k), len(o.entries)
    size = s.m * (s.n + s.k) * o.dtype.itemsize + 4 * k
    return lambda: ops.growth_candidates(dy, x, k), size, 2 * s.m * s.n * s.k


def sm3_update(ops, o, s):
    row, col = o.randn(s.n, dtype=torch.float32).abs(), o.randn(s.k, dtype=torch.float32).abs()
    grad, k = o.randn(len(o.entries), dtype=torch.float32), len(o.entries)
    return lambda: ops.sm3_update(row, col, o.entries, grad), 12 * k + 8 * (s.n + s.k), 4 * k


def sm3_growth(ops, o, s):
    row, col = o.randn(s.n, dtype=torch.float32).abs(), o.randn(s.k, dtype=torch.float32).abs()
    k = len(o.entries)
    size = 4 * (s.n + s.k) + 8 * k
    return lambda: ops.sm3_growth(row, col, o.entries, k), size, s.n * s.k


OPS = (
    linear,
    linear_dx,
    slice_grad,
    slice_grad_each,
    swiglu,
    swiglu_bwd,
    slice_write,
    slice_linear_,
    slice_linear_dx_,
    sparse_write,
    sparse_grad,
    dense_grad,
    growth_candidates,
    sm3_update,
    sm3_growth,
)
WITHOUT_TOKENS = (slice_write, sparse_write, sm3_update, sm3_growth)


def cases(shapes: tuple[Shape, ...]) -> list[tuple[Callable, Shape]]:
    """Every op at every shape; what sees no tokens at the first of each layer alone."""
    first = {shape.name: shape for shape in reversed(shapes)}
    return [
        (op, shape)
        for op in OPS
        for shape in shapes
        if op not in WITHOUT_TOKENS or shape is first[shape.name]
    ]


def plan(seconds: float) -> dict[str, int]:
    """How often a call that takes so long is made: pytest-benchmark's arguments.

    A reference in plain torch that goes through a weight strip by strip takes a second a call.
    """
    if (WARM_UP + ROUNDS) * ITERATIONS * seconds <= SECONDS:
        return {"rounds": ROUNDS, "iterations": ITERATIONS, "warmup_rounds": WARM_UP}
    rounds = min(ROUNDS, max(LEAST_ROUNDS, int(SECONDS / seconds)))
    return {"rounds": rounds, "iterations": 1, "warmup_rounds": 0}


@pytest.mark.parametrize("impl", ("torch", "triton") if CUDA else ("torch",))
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        pytest.param(op, shape, id=f"{op.__name__}-{shape.name} {shape.m}")
        for op, shape in cases(CUDA_SHAPES if CUDA else CPU_SHAPES)
    ],
)
def bench_op(benchmark, op, shape, impl, device):
    operands = Operands(shape, device)
    ops = backend.select(operands.randn(1), impl)
    run, size, flops = op(ops, operands, shape)
    benchmark.group = f"{op.__name__} {shape}"
    benchmark.extra_info.update(bytes=size, flops=flops, dtype=str(operands.dtype))
    run()  # compiles
    (seconds,) = timing.laps([run], device)
    benchmark.pedantic(run, **plan(seconds))
