"""Host time of one layer in one training step: pytest bench/bench_host.py

A toy Llama, on which arithmetic takes next to nothing, so that Python and dispatch are what is
timed, with the code path of a GPU: joined weights and fused FFNs. The time is that of the process,
on one thread. A layer's share is the difference between a deep and a shallow model, so that the
embeddings, the head, the loss and what happens once a step do not count. Every method computes dx
down to the embedding, as the frozen model does; a round times both, and their ratio is what counts.
"""

import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.measure.timing import quartiles
from s2kernels import backend
from s2kernels.flat import FlatAdamW
from s2kernels.peft import S2FTConfig, SpIELConfig, make_optimizer

SHALLOW, DEEP = 4, 16
ROUNDS = 30
TOKENS, HIDDEN = 16, 64
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
METHODS = ("frozen", "full", "lora", "s2ft inplace", "s2ft additive", "s2ft unfused", "spiel")


def base(num_layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=176,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        vocab_size=64,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def attach(method: str, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """The model with what the method trains, and the optimizer of that."""
    if method == "full":
        return model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    model.requires_grad_(False)
    if method == "frozen":
        return model, None
    if method == "spiel":
        model = get_peft_model(model, SpIELConfig(density=0.01))
        return model, make_optimizer(model, lr=1e-6)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules=PROJECTIONS))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    mode = "additive" if method == "s2ft additive" else "inplace"
    fuse = method != "s2ft unfused"
    model = get_peft_model(model, S2FTConfig(heads=1, channels=0.05, mode=mode, fuse=fuse))
    deltas = [p for p in model.parameters() if p.requires_grad]
    return model, FlatAdamW(deltas, lr=1e-6, accumulate_in_backward=True)


def step_of(method: str, num_layers: int):
    model = base(num_layers)
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, y: y if y.requires_grad else y.requires_grad_()
    )
    model, optimizer = attach(method, model)
    model.train()
    ids = torch.randint(64, (1, TOKENS))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(4):
        step()
    return step


class Layer:
    """One layer of a method: `seconds()` of process time in one step."""

    def __init__(self, method: str) -> None:
        self.shallow, self.deep = step_of(method, SHALLOW), step_of(method, DEEP)

    def seconds(self) -> float:
        times = []
        for step in (self.shallow, self.deep):
            start = time.process_time()
            step()
            step()
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
@pytest.mark.parametrize("method", METHODS)
def bench_layer(benchmark, method):
    frozen, layer = Layer("frozen"), Layer(method)
    seconds, floors = [], []

    def round_() -> None:
        floors.append(frozen.seconds())
        seconds.append(layer.seconds())

    rounds = 2 if benchmark.disabled else ROUNDS
    benchmark.group, benchmark.params = "host", {"method": method}
    if benchmark.disabled:
        for _ in range(rounds):
            round_()
    else:
        benchmark.pedantic(round_, rounds=rounds, iterations=1, warmup_rounds=1)
    ratios = [a / b for a, b in zip(seconds, floors, strict=True)]
    benchmark.extra_info.update(
        seconds=quartiles(seconds), floor=quartiles(floors), ratio=quartiles(ratios)
    )
