"""Tiny models with a SpIEL adapter, and training of one."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_model, token_ids

from s2kernels.peft import SpIELConfig, SpIELLinear, SpIELTuner, make_optimizer

MODES = ("inplace", "additive")
EVERY_MODE = pytest.mark.parametrize("mode", MODES)
IDS = token_ids(batch=3)


def config(**fields):
    return SpIELConfig(**dict(num_tunable_weights=1500, seed=3) | fields)


def wrapped(model=None, **fields):
    model = tiny_model("llama") if model is None else model
    return get_peft_model(model, config(**fields))


def layers(model):
    return [module for module in model.modules() if isinstance(module, SpIELLinear)]


def deltas(model, name="default"):
    return [layer.spiel_delta[name] for layer in layers(model)]


def randomized(model, name="default", scale=0.3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in deltas(model, name):
            noise = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
            delta.copy_(noise.to(delta.dtype) * scale)
    return model


def train(model, steps=12, total=40, **options):
    optimizer = make_optimizer(model, **dict(lr=1e-2) | options)
    tuner = SpIELTuner(model, optimizer, total)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tuner.close()
    return losses
