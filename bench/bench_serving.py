"""Serving: what many adapters cost in one batch.

    python -m pytest bench/bench_serving.py --results bench/results --again

Every round times the case and, right before it, what it is compared with. Decoding and prefill are
of a Llama of hidden size 512 with 4 layers, beside the same model without adapters; each adapter
trains one head of o_proj and 28 channels of down_proj in every layer.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bench.measure.beside import compare
from bench.measure.served import HIDDEN, LAYERS, adapter, decoding, llama
from s2kernels.serve import Serving

MANY = 10_000  # adapters


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return llama()


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
        compare(benchmark, step, {"base": other}, adapters=num)


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

    compare(benchmark, run, {"base": forward(base)}, adapters=num, tokens=length)


def bench_peft_mixed(benchmark, base):
    """PEFT's own mixed batch of 32 adapters in decoding. To hold: at most 1.30 of the base."""
    from peft import get_peft_model

    from s2kernels.peft import S2FTConfig

    num = 3 if benchmark.disabled else 32
    names = [f"a{number}" for number in range(num)]
    model = copy.deepcopy(base)
    for seed, name in enumerate(names):
        config = S2FTConfig(heads=1, channels=28, seed=seed)
        if seed:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    model.eval()
    for name, parameter in model.named_parameters():
        if "s2ft_delta" in name:
            parameter.data.normal_(0, 0.02)
    step, other = decoding(model.base_model, num), decoding(base, num)
    with model._enable_peft_forward_hooks(adapter_names=names):  # as within generate
        step()
        compare(benchmark, step, {"base": other}, adapters=num)


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

    compare(benchmark, stepping(many), {"10 registered": stepping(few)}, registered=MANY)
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
    compare(benchmark, run, {"base": other}, working_set=working_set, resident=256)
