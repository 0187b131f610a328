"""Serving: what many adapters cost in one batch, and what a switch costs.

    python -m pytest bench/bench_serving.py --benchmark-json=bench/results/cpu/serving.json

Every round times the case and, right before it, what it is compared with: extra_info holds the
median of their ratios and the quartiles. Decoding and prefill are of a Llama of hidden size 512
with 4 layers, beside the same model without adapters; each adapter trains one head of o_proj and 28
channels of down_proj in every layer. A switch (Figure 6b of the S2FT paper) is of 32 channels of a
weight (d, d), beside the two products with which a LoRA of rank 16 leaves and another one comes,
and beside a copy of as many bytes, or of as many cache lines, which is what it cannot do without.
"""

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from s2kernels.adapter import Slice
from s2kernels.serve import Serving
from s2kernels.serve.switch import Switcher

HIDDEN, LAYERS, HEAD, FFN = 512, 4, 64, 1376
ROUNDS, SECONDS = 60, 15.0
LINE = 64  # bytes
MANY = 10_000  # adapters


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=HIDDEN // HEAD,
        vocab_size=2048,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def adapter(seed: int, heads_of_o: int = HEAD, channels: int = 28) -> dict[str, Slice]:
    generator = torch.Generator().manual_seed(seed)
    slices = {}
    for layer in range(LAYERS):
        head = int(torch.randint(HIDDEN // HEAD, (), generator=generator)) * HEAD
        o_index = torch.arange(head, head + heads_of_o, dtype=torch.int32)
        ffn_index = torch.randperm(FFN, generator=generator)[:channels].int()
        for name, index in (("self_attn.o_proj", o_index), ("mlp.down_proj", ffn_index)):
            delta = torch.randn(HIDDEN, len(index), generator=generator) * 0.02
            slices[f"model.layers.{layer}.{name}"] = Slice("in", index, delta)
    return slices


def compare(benchmark, run: Callable[[], object], other: Callable[[], object], **info) -> None:
    """Times `run`, and right before each of its rounds `other`."""
    if benchmark.disabled:  # each runs once
        other()
        benchmark(run)
        return
    seconds: list[float] = []

    def timed_other() -> None:
        began = time.perf_counter()
        other()
        seconds.append(time.perf_counter() - began)

    for _ in range(3):
        run()
        timed_other()
    rounds = max(7, min(ROUNDS, int(SECONDS / (2 * min(seconds) + 1e-6))))
    seconds.clear()
    benchmark.pedantic(run, setup=timed_other, rounds=rounds, iterations=1)
    ratios = [a / b for a, b in zip(benchmark.stats.stats.data, seconds, strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4)
    benchmark.extra_info.update(
        info, ratio=median, ratio_quartiles=[first, third], other_seconds=statistics.median(seconds)
    )


def decoding(model: nn.Module, rows: int, length: int = 16) -> Callable[[], Tensor]:
    """One step of `rows` sequences that are `length` tokens long."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(
            input_ids=torch.randint(0, 2048, (rows, length)), past_key_values=cache, use_cache=True
        )
    token = torch.randint(0, 2048, (rows, 1))

    def step() -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return step


@pytest.fixture(scope="module")
def base(model):
    """The model as it is, without any hook."""
    return copy.deepcopy(model)


@pytest.fixture
def serving(model):
    served = Serving(model, pool_bytes=2**28)
    yield served
    served.close()


@pytest.mark.parametrize("num", [8, 32, 128])
def bench_decode(benchmark, model, base, serving, num):
    """An adapter a row. To hold: at most 1.10, 1.20 and 1.25 of the base."""
    names = [f"a{number}" for number in range(num)]
    for seed, name in enumerate(names):
        serving.register(name, adapter(seed))
    step, other = decoding(model, num), decoding(base, num)
    with serving.rows(names):
        compare(benchmark, step, other, adapters=num, beside="base")


@pytest.mark.parametrize(("num", "length"), [(8, 64), (32, 16), (1, 256)])
def bench_prefill(benchmark, model, base, serving, num, length):
    """To hold: at most 1.25 of the base."""
    names = [f"a{number}" for number in range(num)]
    for seed, name in enumerate(names):
        serving.register(name, adapter(seed))
    ids = torch.randint(0, 2048, (num, length))

    def forward(of: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                of(input_ids=ids, logits_to_keep=1, use_cache=False)

        return run

    # A plan is made once a prefill, as generate does.
    def run() -> None:
        with serving.rows(names):
            forward(model)()

    compare(benchmark, run, forward(base), adapters=num, tokens=length, beside="base")


@pytest.fixture(scope="module")
def crowds(model, request):
    """A Serving with 10 adapters, and one with 10,000 of which 256 are resident; with
    --benchmark-disable of 300.
    """
    made = []
    for num in (10, 300 if request.config.getoption("benchmark_disable") else MANY):
        served = Serving(copy.deepcopy(model), pool_bytes=256 * 8 * LAYERS * 2 * HIDDEN * 4)
        for seed in range(num):
            served.register(f"a{seed}", adapter(seed, 8, 8))
        for seed in range(min(num, 256)):
            served.store.prefetch(f"a{seed}")
        made.append(served)
    return made


def bench_ten_thousand(benchmark, crowds):
    """A step of 10 adapters, brought in and let go. To hold: within 3 % of that with 10 in all."""
    few, many = crowds
    names = [f"a{number}" for number in range(10)]
    for name in names:
        many.store.pin(name)

    def stepping(served: Serving) -> Callable[[], None]:
        step = decoding(served.model, 10)

        def run() -> None:
            with served.rows(names):
                step()

        return run

    compare(benchmark, stepping(many), stepping(few), registered=MANY, beside="10 registered")
    for name in names:
        many.store.unpin(name)


@pytest.mark.parametrize("working_set", [128, 256, 512, 1024, MANY])
def bench_past_residency(benchmark, base, crowds, working_set):
    """Steps of 16 adapters, drawn anew each time, with room for 256: no cliff as more are used."""
    many = crowds[1]
    step, other = decoding(many.model, 16), decoding(base, 16)
    generator = torch.Generator().manual_seed(0)

    known = min(working_set, len(many.store.names()))

    def run() -> None:
        drawn = torch.randint(known, (16,), generator=generator).tolist()
        with many.rows([f"a{number}" for number in drawn]):
            step()

    for _ in range(0 if benchmark.disabled else 40):
        run()
    compare(benchmark, run, other, working_set=working_set, resident=256, beside="base")


@pytest.mark.parametrize("beside", ["lora", "floor"])
@pytest.mark.parametrize("kind", ["rows", "run", "columns"])
@pytest.mark.parametrize("size", [1024, 4096])
def bench_switch(benchmark, size, kind, beside):
    """To hold: 2 x its bytes for rows and runs, 1.5 x its lines for columns; beside LoRA at most
    1/12 and 1/150 for rows, 1/3 and 1/10 for columns.
    """
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    switcher, channels = Switcher(model), 32
    adapters = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(size, generator=generator)[:channels].int()
        if kind == "run":
            index = torch.arange(64 + 512 * seed, 64 + 512 * seed + channels, dtype=torch.int32)
        dim, shape = ("out", (channels, size)) if kind == "rows" else ("in", (size, channels))
        adapters.append({"0": Slice(dim, index, torch.randn(shape) * 0.02)})
    turn = [0]

    def run() -> None:
        turn[0] ^= 1
        switcher.switch(turn[0], adapters[turn[0]])

    weight = torch.randn(size, size)
    factors = [(torch.randn(size, 16), torch.randn(16, size)) for _ in range(2)]

    def lora() -> None:
        turn[0] ^= 1
        weight.addmm_(*factors[turn[0]], alpha=-1)
        weight.addmm_(*factors[1 - turn[0]])

    # Two slices are written: so many floats for rows, so many lines for scattered columns.
    floats = 2 * channels * size * (LINE // 4 if kind == "columns" else 1)
    source, target = torch.randn(floats), torch.randn(floats)
    other = lora if beside == "lora" else lambda: target.copy_(source)
    compare(benchmark, run, other, kind=kind, size=size, beside=beside)
