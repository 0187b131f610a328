"""Figure 6 of the S2FT paper: to switch an adapter, and to serve many in parallel; and to fuse two.

    python -m pytest bench/bench_figure6.py --results bench/results --again

32 channels of a weight (d, d) as in the paper, beside LoRAs of rank 16, which have as many bytes;
fp32. Each case also stands beside a floor, which it cannot do without: to copy what a switch
writes (of scattered columns all of their cache lines), and to read the adapters once in parallel.
"""

import itertools

import pytest
import torch
from torch import nn

from bench.measure.beside import compare
from s2kernels import backend
from s2kernels.adapter import Slice, combine
from s2kernels.groups import make_groups
from s2kernels.serve.switch import Switcher

CHANNELS, RANK = 32, 16
LINE = 64  # bytes
WIDTH = 2048  # of the weight, in parallel, as in the paper's script
KINDS = ["rows", "run", "columns"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small(benchmark, size: int, most: int) -> int:
    """The size, or for --benchmark-disable `most` at most."""
    return min(size, most) if benchmark.disabled else size


def slices(kind: str, size: int, seed: int) -> dict[str, Slice]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(size, generator=generator)[:CHANNELS].int()
    if kind == "run":
        start = 64 + size // 2 * seed
        index = torch.arange(start, start + CHANNELS, dtype=torch.int32)
    dim, shape = ("out", (CHANNELS, size)) if kind == "rows" else ("in", (size, CHANNELS))
    return {"0": Slice(dim, index, torch.randn(shape, generator=generator) * 0.02)}


def switcher_of(size: int) -> Switcher:
    layer = nn.utils.skip_init(nn.Linear, size, size, bias=False)
    layer.weight.data.normal_(0, 0.02)
    return Switcher(nn.Sequential(layer))


def factors(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, RANK) * 0.02, torch.randn(RANK, size) * 0.02


def copying(kind: str, size: int, num_slices: int):
    """A copy of as many bytes as slices have, or of as many lines for scattered columns."""
    floats = num_slices * CHANNELS * size * (LINE // 4 if kind == "columns" else 1)
    source, target = torch.randn(floats), torch.randn(floats)
    return lambda: target.copy_(source)


@pytest.mark.parametrize("size", [1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("kind", KINDS)
def bench_switch(benchmark, kind, size):
    """One adapter leaves, exactly, and another one comes; of LoRAs by two products.

    To hold: 2 x its bytes for rows and runs, 1.5 x its lines for columns; beside LoRA at most 1/12
    (d = 1024) and 1/150 (4096) for rows, 1/3 and 1/10 for columns.

    The floor of columns copies lines that are adjacent, and scattered ones take longer on their
    own: on a busy machine, NumPy took 1.6, 2.3 and 2.5 times as long as the floor (d = 4096, 8192,
    16384) merely to read one number of each line, and 1.5, 2.0 and 2.1 times to write one.
    """
    size = small(benchmark, size, 1024)
    switcher, adapters = switcher_of(size), [slices(kind, size, seed) for seed in range(2)]
    turn = itertools.cycle([0, 1])

    def run() -> None:
        number = next(turn)
        switcher.switch(number, adapters[number])

    weight, loras = torch.randn(size, size) * 0.02, [factors(size) for _ in range(2)]

    def lora() -> None:
        weight.addmm_(*loras[0], alpha=-1)
        weight.addmm_(*loras[1])

    others = {"lora": lora, "floor": copying(kind, size, 2)}
    compare(benchmark, run, others, kind=kind, size=size)


@pytest.mark.parametrize("size", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def bench_fuse(benchmark, kind, size):
    """The weighted sum of two adapters is made and comes, and leaves again, exactly."""
    size = small(benchmark, size, 1024)
    switcher, adapters = switcher_of(size), [slices(kind, size, seed) for seed in range(2)]
    keys = itertools.count()

    def run() -> None:
        switcher.switch(next(keys), combine(adapters, [0.7, 0.3]))
        switcher.switch(None, None)

    weight, loras = torch.randn(size, size) * 0.02, [factors(size) for _ in range(2)]

    def lora() -> None:
        for share in (0.7, 0.3, -0.7, -0.3):
            weight.addmm_(*loras[share in (0.3, -0.3)], alpha=share)

    others = {"lora": lora, "floor": copying(kind, size, 4)}
    compare(benchmark, run, others, kind=kind, size=size)


@pytest.mark.parametrize("adapters", [1, 10, 100, 1000, 10_000])
def bench_parallel(benchmark, adapters):
    """A token for each adapter: in-slices; beside out-slices, LoRAs in two bmm, and a floor."""
    num, generator = small(benchmark, adapters, 10), torch.Generator().manual_seed(0)
    pool = torch.empty(num * CHANNELS, WIDTH).normal_(0, 0.02)
    of_adapter = torch.arange(num * CHANNELS, dtype=torch.int32).view(num, CHANNELS)
    channels = torch.rand(num, WIDTH, generator=generator).topk(CHANNELS).indices
    groups = make_groups(torch.arange(num), list(of_adapter), list(channels))
    x, y, ops = torch.randn(num, WIDTH), torch.zeros(num, WIDTH), backend.select(pool)
    down = torch.empty(num, WIDTH, RANK).normal_(0, 0.02)
    up = torch.empty(num, RANK, WIDTH).normal_(0, 0.02)
    vector = torch.randn(WIDTH)
    others = {
        "ours, output channels": lambda: ops.grouped_out_(y, x, pool, groups),
        "lora": lambda: torch.baddbmm(y[:, None], torch.bmm(x[:, None], down), up),
        "floor": lambda: torch.mv(pool, vector),
    }
    compare(benchmark, lambda: ops.grouped_in_(y, x, pool, groups), others, adapters=num)
