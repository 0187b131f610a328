"""Host time, counted: Python function calls of one layer in one training step.

A GPU finishes a layer of a 7B model at 512 tokens in about a millisecond, so Python must not take
longer. Calls do not depend on the machine, times do: see bench/bench_host.py for these.
"""

import gc
import sys
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_model, token_ids

from s2kernels import backend
from s2kernels.flat import FlatAdamW
from s2kernels.peft import S2FTConfig, SpIELConfig

IDS = token_ids()
S2FT = dict(heads=1, channels=8, seed=3)
# Measured with torch 2.13: 183, 201, 179 and 387; the frozen model makes 93, PEFT's LoRA 263. The
# rest is room for other versions of Python and torch.
MOST = {"inplace": 195, "additive": 213, "unfused": 191, "spiel": 405}


def prepared(method: str, num_layers: int, inactive: int = 0):
    """A step of the method, with dx down to the embeddings, as Python calls it on a GPU."""
    model = tiny_model("llama", torch.float32, num_hidden_layers=num_layers)
    model.requires_grad_(False)
    inner, optimizer = model, None
    if method == "spiel":
        config = SpIELConfig(density=0.02, seed=3, mode="inplace")
        model = get_peft_model(model, config)
    else:
        mode = "additive" if method == "additive" else "inplace"
        config = S2FTConfig(mode=mode, fuse=method != "unfused", **S2FT)
        model = get_peft_model(model, config)
        deltas = [p for p in model.parameters() if p.requires_grad]
        optimizer = FlatAdamW(deltas, accumulate_in_backward=True)
    for i in range(inactive):
        model.add_adapter(f"other{i}", replace(config, seed=i))
    inner.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_())
    model.train()

    def step():
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def calls(step) -> int:
    """Python function calls of one step, once everything is prepared."""
    for _ in range(3):
        step()
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call"

    gc.disable()  # a collection in the middle would call what waits for others' end
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def calls_of_a_layer(method: str) -> float:
    """Of one layer more, so that the embeddings, the head and the loss do not count."""
    few, many = (calls(prepared(method, num_layers)) for num_layers in (2, 6))
    return (many - few) / 4


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "prefers_joined", lambda weight: True)


@pytest.mark.parametrize("method", MOST)
def test_python_calls_of_a_layer(method):
    assert calls_of_a_layer(method) <= MOST[method]


@pytest.mark.parametrize("method", MOST)
def test_adapters_that_are_not_active_cost_no_calls(method):
    assert calls(prepared(method, 2, inactive=10)) == calls(prepared(method, 2))
