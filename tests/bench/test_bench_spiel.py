"""SpIEL as one of the methods that are measured."""

import copy

import pytest
import torch
from tiny_models import tiny_model, token_ids

from bench.methods import Budget
from bench.methods.options import Options, Unavailable
from bench.methods.spiel import SpIEL

BATCH = token_ids(batch=3)
BUDGET = Budget(heads=1, channels=8, rank=2, seed=0)


def start(**options):
    model = tiny_model("llama", torch.float32)
    return SpIEL(model, BUDGET, 1e-2, Options(**options))


def indices(method):
    return [layer.spiel_index["default"].clone() for layer in method.tuner.layers]


def changed(before, method):
    return [not torch.equal(a, b) for a, b in zip(before, indices(method), strict=True)]


def test_it_trains_as_many_entries_as_lora_has_parameters():
    method = start()
    linears = [layer.weight.shape for layer in method.tuner.layers]
    lora = BUDGET.rank * sum(n + k for n, k in linears)
    assert lora - len(method.tuner.layers) <= method.trained_parameters() <= lora
    losses = [method.step(BATCH).item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("checkpointing", (False, True))
def test_entries_are_replaced_when_they_are_due(checkpointing):
    method = start(checkpointing=checkpointing)
    assert method.period == 20
    for _ in range(7):
        method.step(BATCH)
    states = sum(tensor.numel() for tensor in method.state_tensors())
    assert states == 3 * method.trained_parameters()  # no window is open
    before = indices(method)
    method.step(BATCH)
    assert not any(changed(before, method))
    for _ in range(2):
        before = indices(method)
        method.make_due()
        method.step(BATCH)
        assert all(changed(before, method))
        before = indices(method)
        method.step(BATCH)
        assert not any(changed(before, method))


def test_a_due_step_observes_a_whole_window():
    method = start()
    twin = copy.deepcopy(method.tuner.layers[0].weight)
    method.make_due()
    watch, observed = method.tuner.watches[0], []
    real = watch.observe
    watch.observe = lambda dy, x: observed.append(dy.shape) or real(dy, x)
    method.step(BATCH)
    assert len(observed) == 6
    assert torch.equal(twin, method.tuner.layers[0].weight)


def test_compiled_models_are_refused():
    with pytest.raises(Unavailable, match="compiled"):
        start(compile=True)
