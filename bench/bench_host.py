"""Host time of one layer in one training step: pytest bench/bench_host.py

A toy Llama, on which arithmetic takes next to nothing, so that Python and dispatch are what is
timed, with the code path of a GPU: joined weights and fused FFNs. The time is that of the process,
on one thread. A layer's share is the difference between a deep and a shallow model, so that the
embeddings, the head, the loss and what happens once a step do not count. Every method computes dx
down to the embedding, as the frozen model does; a round times both, and their ratio is what counts.
Steps with periodic work are taken between the rounds.
"""

import time
from dataclasses import replace

import pytest
import torch

from bench.measure.timing import quartiles, ratio
from bench.methods import METHODS, Method, Options, comparable
from bench.steps.model_shapes import TABLE
from s2kernels import backend
from s2kernels.flat import FlatAdamW

SHALLOW, DEEP = 4, 16
ROUNDS = 30
TOKENS = 16
LR = 1e-6  # the model stays as it is
# LISA trains as many layers in the deep model as in the shallow one: a layer has no share in that.
COMPARED = [name for name in METHODS if name != "lisa"]


def build(name: str, layers: int) -> Method:
    """A toy model of so many layers. Of S2FT's optimizers the one with the least host time."""
    model = replace(TABLE["toy"], layers=layers, of_layers=layers).build(
        TOKENS, torch.float32, "cpu"
    )
    budget = comparable(model.config, rank=8)
    method = METHODS[name](model, budget, LR, Options(full_depth=True))
    if name.startswith("s2ft"):
        method.optimizer = FlatAdamW(method.trained(), lr=LR, accumulate_in_backward=True)
    return method


class Layer:
    """One layer of a method: `seconds()` of process time in one step."""

    def __init__(self, name: str) -> None:
        self.batch = torch.randint(TABLE["toy"].vocab, (1, TOKENS))
        self.methods = [build(name, layers) for layers in (SHALLOW, DEEP)]
        for method in self.methods:
            for _ in range(4):
                method.step(self.batch)

    def seconds(self) -> float:
        times = []
        for method in self.methods:
            while method.is_due():
                method.step(self.batch)
            start = time.process_time()
            method.step(self.batch)
            method.step(self.batch)
            times.append((time.process_time() - start) / 2)
        return (times[1] - times[0]) / (DEEP - SHALLOW)


@pytest.fixture(autouse=True)
def _on_one_thread_as_on_a_gpu(monkeypatch, device):
    if device.type != "cpu":
        pytest.skip("host time is measured on a CPU")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(backend, "prefers_joined", lambda weight: True)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("method", COMPARED)
def bench_layer(benchmark, method):
    frozen, layer = Layer("frozen"), Layer(method)
    floors, seconds = [], []

    def round_() -> None:
        floors.append(frozen.seconds())
        seconds.append(layer.seconds())

    benchmark.group, benchmark.params = "host", {"method": method}
    benchmark.pedantic(round_, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    if not benchmark.disabled:
        benchmark.extra_info.update(
            seconds=quartiles(seconds), floor=quartiles(floors), ratio=ratio(seconds, floors)
        )
