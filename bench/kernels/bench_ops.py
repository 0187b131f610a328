"""Every op at the shapes of one linear layer: torch beside Triton, which needs a GPU to be timed.

Each entry states in extra_info the bytes and the FLOPs that the op cannot do without. On a GPU a
round is one replay of a graph of many launches, divided by their number: see `bench.kernels.laps`.
The host calls what waits for the device: of a short op that is the host's time.
"""

import pytest
import torch

from bench.kernels import laps
from bench.kernels.ops import CASES, Case, Operands, Sizes
from bench.measure import machine, timing
from bench.steps.work import OPS
from s2kernels import backend

CUDA = torch.cuda.is_available()
CPU_SIZES = (Sizes("small", 256, 256, 704, 16),)
CUDA_SIZES = tuple(
    Sizes(f"llama2-7b {layer}", m, 4096, k, 256)
    for layer, k in (("o_proj", 4096), ("down_proj", 11008))
    for m in (512, 2048, 4096, 8192)
)
ROUNDS, LEAST_ROUNDS = 20, 3
SECONDS = 3.0  # of all rounds of a case, where they would take longer
CLOCK = timing.Clock(machine.default_device())


def cases(listed: tuple[Sizes, ...]) -> list[tuple[str, Case, Sizes]]:
    """(name, case, sizes): every op at all sizes, or at the first of a layer if it sees no tokens.

    R is that of the sizes, whatever the compiler's case is of. dense_grad is the gradient of the
    whole weight by one product: what sparse_grad is compared with.
    """
    named: dict[str, Case] = {}
    for case in CASES.values():
        named.setdefault(case.op, case)
    named["dense_grad"] = Case("linear", lambda o, s: [(o(s.m, s.n).t(), o(s.m, s.k).t())])
    first = {sizes.name: sizes for sizes in reversed(listed)}
    return [
        (name, case, sizes)
        for name, case in named.items()
        for sizes in listed
        if case.by_tokens or sizes is first[sizes.name]
    ]


def rounds(seconds: float) -> int:
    """How many of such a lap: a reference that goes through a weight in strips takes a second."""
    return min(ROUNDS, max(LEAST_ROUNDS, int(SECONDS / seconds)))


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("impl", ("torch", "triton") if CUDA else ("torch",))
@pytest.mark.parametrize(
    ("name", "case", "sizes"),
    [
        pytest.param(*each, id=f"{each[0]}-{each[2].name} {each[2].m}")
        for each in cases(CUDA_SIZES if CUDA else CPU_SIZES)
    ],
)
def bench_op(benchmark, name, case, sizes, impl, device):
    torch.manual_seed(0)
    operands = Operands(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    sets = laps.operand_sets(lambda: next(iter(case.calls(operands, sizes))), device)
    run = getattr(backend.select(operands(1), impl), case.op)
    needed, waits = OPS[case.op](*sets[0]), impl in case.waits
    benchmark.group = f"{name} {sizes.name} M={sizes.m}"
    benchmark.extra_info.update(bytes=needed.bytes, flops=needed.flops, dtype=str(operands.dtype))
    CLOCK.launches = laps.launches_in_a_lap(run, sets, device)
    lap = laps.lap(run, sets, CLOCK.launches, device, waits)
    (seconds,) = timing.laps([lap], device)
    benchmark.pedantic(lap, rounds=rounds(seconds), iterations=1, warmup_rounds=1)
