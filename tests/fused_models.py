"""Tiny models with FFNs by one Function, and how often it was asked for."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_model, token_ids

from s2kernels.peft import S2FTConfig
from s2kernels.peft.s2ft import fused_mlp

SETTINGS = [
    ("inplace", "permute"),
    ("inplace", "gather"),
    ("additive", "permute"),
    ("additive", "gather"),
]
EVERY_SETTING = pytest.mark.parametrize(("mode", "layout"), SETTINGS)


def count_calls(monkeypatch):
    """A list that grows by one with every call of the Function of a FFN."""
    calls, apply = [], fused_mlp.apply

    def call(*args):
        calls.append(None)
        return apply(*args)

    monkeypatch.setattr(fused_mlp, "apply", call)
    return calls


def taken(calls):
    """How many there were since the last time."""
    count = len(calls)
    calls.clear()
    return count


def adapted(model_type="llama", dtype=torch.float64, **fields):
    """A model with random deltas, as deterministic as the tiny model is."""
    given = dict(heads=2, channels=5, seed=3) | fields
    model = get_peft_model(tiny_model(model_type, dtype), S2FTConfig(**given))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, delta in model.named_parameters():
            if "s2ft_delta" in name:
                delta.copy_(torch.randn(delta.shape, generator=generator, dtype=delta.dtype) * 0.3)
    return model


def gradients(model, ids=None, **kwargs):
    ids = token_ids() if ids is None else ids
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **kwargs).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_close(got, want, atol=1e-12):
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=atol)
    assert got[1].keys() == want[1].keys() and got[1]
    for name in want[1]:
        torch.testing.assert_close(got[1][name], want[1][name], rtol=0, atol=atol)


def blocks(model):
    return model.get_base_model().model.layers
