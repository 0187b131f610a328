"""The one catalogue of the ops: what each of them is called with.

A `Case` lists calls of an op of `s2kernels.kernels` at some `Sizes`, as tuples of its arguments.
`bench_ops` times the first call, on random operands. `compile` compiles what all calls launch, on
operands without content, for chips that are not there. `tune` takes the first call at the shapes of
`candidates` and looks for the fastest launch. `bench.steps.work` has the bytes and FLOPs of a call.

Sizes: M tokens, N out_features, K in_features, R trained channels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from s2kernels import kernels
from s2kernels.kernels.score_search import BINS, Bounds, Buffers
from s2kernels.kernels.sparse_growth import candidate_passes, product_passes
from s2kernels.plan import TilePlan, index_dtype
from s2kernels.update import Update, WeightSlice


@dataclass(frozen=True)
class Sizes:
    name: str
    m: int
    n: int
    k: int
    r: int


@dataclass
class Operands:
    """Makes operands on `device` in `dtype`: random ones, or without content for a compiler."""

    device: torch.device
    dtype: torch.dtype
    random: bool = True
    layers: int = 32  # that a kernel which serves a whole model gets at once
    experts: int = 8

    @property
    def host(self) -> "Operands":
        """The same, but of tensors that have an address: a launcher puts it into a table."""
        if self.device.type != "meta":
            return self
        return replace(self, device=torch.device("cpu"), layers=2)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        make = torch.randn if self.random else torch.empty
        return make(*shape, device=self.device, dtype=dtype or self.dtype)

    def fp32(self, *shape: int) -> Tensor:
        return self(*shape, dtype=torch.float32)

    def index(self, r: int, size: int) -> Tensor:
        """R of so many channels, int32, in order; on the host for a compiler, to be looked at."""
        return torch.randperm(size)[:r].sort().values.to(self.host.device, torch.int32)

    def entries(self, n: int, k: int) -> Tensor:
        """Positions in a weight (N, K), sorted: about as many as LoRA of rank 16 has parameters.

        A little fewer, for those that are drawn twice: a permutation of all takes seconds.
        """
        drawn = torch.randint(n * k, (16 * (n + k),), device=self.device).unique()
        return drawn.to(index_dtype((n, k)))


Calls = Iterable[tuple]  # of arguments


def _linear(o: Operands, s: Sizes) -> Calls:
    x, weight = o(s.m, s.k), o(s.n, s.k)
    yield x, weight
    yield x, weight, o(s.n)
    yield x[:1], weight  # one token is no tensor to Triton, but the number 1


def _linear_plus_slice(o: Operands, s: Sizes) -> Calls:
    yield o(s.m, s.k), o(s.n, s.k), None, o(s.m, s.r), o.fp32(s.n, s.r)
    yield o(s.m, s.k), o(s.n, s.k), o(s.n), o(s.m, s.r), o.fp32(s.n, s.r)


def _linear_dx_swiglu_bwd(o: Operands, s: Sizes) -> Calls:
    dy, weight, gate, up = o(s.m, s.n), o(s.n, s.k), o(s.m, s.k), o(s.m, s.k)
    yield dy, weight, gate, up, slice(0, s.r)
    yield dy[:1], weight, gate[:1], up[:1], slice(0, s.r)


def _operands(o: Operands, s: Sizes, dim: str) -> tuple[tuple, tuple, Tensor, Tensor]:
    """(dy, x); the same with the sliced one compact; its channels; delta of the slice."""
    dy, x, compact = o(s.m, s.n), o(s.m, s.k), o(s.m, s.r)
    if dim == "in":
        return (dy, x), (dy, compact), o.index(s.r, s.k), o.fp32(s.n, s.r)
    return (dy, x), (compact, x), o.index(s.r, s.n), o.fp32(s.r, s.k)


def _slice_grad(dim: str, o: Operands, s: Sizes) -> Calls:
    (dy, x), compact, index, out = _operands(o, s, dim)
    yield *compact, None, dim
    yield dy, x, index, dim
    # Few tokens: no split, and the sum goes straight into the gradient.
    yield dy[:64], x[:64], slice(256, 256 + s.r), dim, out


def _slice_update(dim: str, o: Operands, s: Sizes) -> Calls:
    """`slice_grad` that a step of AdamW uses up, and whose weight is written."""
    (dy, x), compact, index, values = _operands(o, s, dim)
    moments = o.fp32(*values.shape), o.fp32(*values.shape)
    update = Update(values, *moments, o.fp32(3), (0.9, 0.999), 1e-8)
    weight, base = o(s.n, s.k), o(*values.shape)
    for where in (slice(256, 256 + s.r), index):
        written = WeightSlice(weight, base, where, dim)
        yield *compact, None, dim, update._replace(slice=written)
        # Few tokens: no split, and the step is done where the sum is computed.
        yield dy[:64], x[:64], where, dim, update._replace(slice=written)


def _slice_grad_each(dim: str, o: Operands, s: Sizes) -> Calls:
    """Of experts with as many tokens each."""
    (dy, x), compact, index, out = _operands(o, s, dim)
    ends = torch.arange(1, o.experts + 1, dtype=torch.int32) * (s.m // o.experts)
    offsets = ends.to(o.device)
    index, grads = (each.expand(o.experts, *each.shape).contiguous() for each in (index, out))
    yield *compact, offsets, None, dim, grads
    yield dy, x, offsets, index, dim, grads


def _swiglu_bwd(o: Operands, s: Sizes) -> Calls:
    operands = o(s.m, s.k), o(s.m, s.k), o(s.m, s.k)
    for index in (o.index(s.r, s.k), slice(0, s.r), None):
        yield *operands, index


def _slice_linear_(dim: str, o: Operands, s: Sizes) -> Calls:
    (y, x), _, index, delta = _operands(o, s, dim)
    for where in (index, slice(0, s.r)):
        yield y, x, delta, where, dim


def _slice_linear_dx_(dim: str, o: Operands, s: Sizes) -> Calls:
    for y, x, delta, index, _ in _slice_linear_(dim, o, s):
        yield x, y, delta, index, dim


def _slice_write(o: Operands, s: Sizes) -> Calls:
    """All layers of a model by one call, as a forward does it."""
    o = o.host
    index = o.index(s.r, s.k)
    weights = [o(s.n, s.k) for _ in range(o.layers)]
    bases, deltas = ([make(s.n, s.r) for _ in weights] for make in (o, o.fp32))
    yield weights, bases, deltas, [index] * o.layers, ["in"] * o.layers
    run = [slice(0, s.r)] * 2  # both dimensions, and the base alone
    base, delta = [o(s.n, s.r), o(s.r, s.k)], [o.fp32(s.n, s.r), o.fp32(s.r, s.k)]
    yield weights[:2], base, delta, run, ["in", "out"]
    yield weights[:2], base, [None, None], run, ["in", "out"]


def _sparse_write(o: Operands, s: Sizes) -> Calls:
    """All layers of a model by one call."""
    o = o.host
    entries = o.entries(s.n, s.k)
    weights = [o(s.n, s.k) for _ in range(o.layers)]
    bases, deltas = ([make(len(entries)) for _ in weights] for make in (o, o.fp32))
    yield weights, bases, deltas, [entries] * o.layers
    yield [weights[0].t()], bases[:1], None, [entries.long()]


def _sparse_grad(o: Operands, s: Sizes) -> Calls:
    dy, x = o(s.m, s.n), o(s.m, s.k)
    if o.random:
        entries = o.entries(s.n, s.k)
        yield dy, x, entries, kernels.tile_plan(entries, (s.n, s.k))
        return
    ints = partial(torch.empty, dtype=torch.int32, device="meta")
    k = s.n * s.k // 100
    for tiles, grad in ((1376, None), (1376, o.fp32(k)), (100, None)):
        held = ints(tiles), ints(tiles + 1), ints(k), ints(k, dtype=torch.int16)
        yield dy, x, ints(k), TilePlan((s.n, s.k), *held), grad


def _sm3(growth: bool, o: Operands, s: Sizes) -> Calls:
    """The statistics of SM3, positions of the entries, and their gradients or how many grow."""
    o = o.host
    entries = o.entries(s.n, s.k)
    last = len(entries) if growth else o.fp32(len(entries))
    yield o.fp32(s.n).abs(), o.fp32(s.k).abs(), entries, last


def _launch_passes(look: Callable, programs: int) -> None:
    """All passes that a launcher may make: which ones depends on what those before them count."""
    counts = torch.empty((programs, BINS), dtype=torch.int32)
    found = torch.empty((), dtype=torch.int64)
    keys, positions = torch.empty(100, dtype=torch.int32), torch.empty(100, dtype=torch.int64)
    for rows in (False, True):
        look(Buffers(counts), Bounds(0, 20, 2048), COLLECT=False, ROWS=rows)
    look(Buffers(None, keys, positions, found), Bounds(capacity=100), COLLECT=True, ROWS=False)


@dataclass(frozen=True)
class Case:
    """op: its name in `s2kernels.kernels`. rank: R, where it is not that of the sizes.

    launch: what a compiler sees in the place of the op, where launches depend on contents.
    by_tokens: whether the number of tokens matters to it.
    waits: the implementations that wait for the device in a call, to look at what it found.
    """

    op: str
    calls: Callable[[Operands, Sizes], Calls]
    rank: int | None = None
    launch: Callable | None = None
    by_tokens: bool = True
    waits: tuple[str, ...] = ()


_UNSLICED = (
    Case("linear", _linear),
    Case("linear_dx", lambda o, s: [(o(s.m, s.n), o(s.n, s.k))]),
    Case("linear_plus_slice", _linear_plus_slice),
    Case(
        "linear_dx_plus_slice",
        lambda o, s: [(o(s.m, s.n), o(s.n, s.k), o(s.m, s.r), o.fp32(s.r, s.k))],
    ),
    Case("linear_dx_swiglu_bwd", _linear_dx_swiglu_bwd),
    Case("swiglu", lambda o, s: [(o(s.m, s.k), o(s.m, s.k))]),
    Case("swiglu_bwd", _swiglu_bwd),
    Case("slice_write", _slice_write, by_tokens=False),
    Case("sparse_write", _sparse_write, by_tokens=False),
    Case("sparse_grad", _sparse_grad, waits=("torch",)),
    Case(
        "growth_candidates",
        lambda o, s: [(o(s.m, s.n), o(s.m, s.k), 16 * (s.n + s.k))],
        launch=lambda dy, x, k: _launch_passes(*candidate_passes(dy, x)),
        waits=("torch", "triton"),
    ),
    Case("sm3_update", partial(_sm3, False), by_tokens=False),
    Case(
        "sm3_growth",
        partial(_sm3, True),
        launch=lambda row, col, index, k: _launch_passes(*product_passes(row, col, index)),
        by_tokens=False,
        waits=("torch", "triton"),
    ),
)
# Each of the blocks that a slice of R channels can get; a single channel is no tensor to Triton.
_BLOCKS = (16, 32, 64, 256)
# Ops whose code depends on R and on the dimension of the slice: the R of in-slices, and of
# out-slices. Where there is one R, the code is the same but for strides.
_SLICED = (
    ("slice_grad", Case("slice_grad", _slice_grad), (1, *_BLOCKS), (1, *_BLOCKS)),
    ("slice_update", Case("slice_grad", _slice_update), (64, 256), (256,)),  # else as slice_grad
    (
        "slice_grad_each",
        Case("slice_grad_each", _slice_grad_each, waits=("torch",)),
        (1, *_BLOCKS),
        (256,),
    ),
    ("slice_linear_", Case("slice_linear_", _slice_linear_), (256,), _BLOCKS),
    ("slice_linear_dx_", Case("slice_linear_dx_", _slice_linear_dx_), _BLOCKS, (256,)),
)
CASES: dict[str, Case] = {case.op: case for case in _UNSLICED} | {
    f"{name}-{dim}-{r}": replace(case, calls=partial(case.calls, dim), rank=r)
    for name, case, *ranks in _SLICED
    for dim, each in zip(("in", "out"), ranks, strict=True)
    for r in each
}
