"""Times of short kernels: many launches in one lap, on operands that are in no cache.

On a GPU the launches of a lap are captured in a CUDA graph once and replayed, so that what the host
needs for a launch is not measured. The launches use sets of operands in turn, OPERAND_BYTES in all,
so that no launch finds its operands in the L2 cache.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.measure import timing
from bench.measure.memory import tensors_in, total_bytes

LAP_SECONDS = 2e-3  # of one lap on a GPU
OPERAND_BYTES = 2**28  # several times the L2 cache
MAX_SETS = 16


def operand_sets(make: Callable[[], tuple], device: torch.device) -> list[tuple]:
    """The arguments that `make` makes, and so many more sets of them as OPERAND_BYTES allow."""
    first = make()
    if device.type == "cpu":
        return [first]
    number = OPERAND_BYTES // max(1, total_bytes(tensors_in(first)))
    return [first, *(make() for _ in range(1, min(MAX_SETS, number)))]


def launches_in_a_lap(run: Callable, sets: Sequence[tuple], device: torch.device) -> int:
    """So many that a lap of `run` takes LAP_SECONDS on a GPU; one on a CPU."""
    if device.type == "cpu":
        return 1
    run(*sets[0])
    (once,) = timing.laps([lambda: run(*sets[-1])], device)
    return max(len(sets), round(LAP_SECONDS / max(once, 1e-6)))


def lap(
    run: Callable, sets: Sequence[tuple], count: int, device: torch.device, waits: bool = False
) -> Callable[[], object]:
    """Calls `run` `count` times, on one set of operands after another; a graph on a GPU.

    waits: whether `run` waits for the device, which no graph can hold: the host then calls it.
    """

    def plain() -> None:
        for number in range(count):
            run(*sets[number % len(sets)])

    plain()  # compiles, and warms up
    if device.type == "cpu" or waits:
        return plain
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain()
    return graph.replay


def ceilings(device: torch.device) -> dict:
    """The most that the machine can do: FLOP/s of a large square product by dtype, with TF32 only
    if torch is set so, and bytes/s read and written by a large copy. Medians, on random data.
    """
    size = {"cpu": 1024, "cuda": 8192}[device.type]
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        product = _median(lambda x=x, weight=weight: torch.mm(x, weight), device)
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / product
    nbytes = {"cpu": 2**28, "cuda": 2**31}[device.type]  # several times the last cache
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * nbytes / _median(lambda: target.copy_(source), device)
    return {"gemm_flops": rates, "copy_bytes_per_second": copied}


def _median(action: Callable[[], Tensor], device: torch.device, rounds: int = 10) -> float:
    timing.laps([action] * 2, device)
    return timing.quartiles(timing.laps([action] * rounds, device))["median"]
