"""What tests of both tuners ask of a model with adapters."""

from functools import partial

import pytest
import torch
from s2ft_models import COMBINATIONS, MODES
from tiny_models import token_ids

from s2kernels.peft import S2FTConfig, SpIELConfig, SpIELTuner, make_optimizer
from s2kernels.peft.host.layer import AdapterLayer

EVERY_CONFIG = pytest.mark.parametrize("config", (S2FTConfig, SpIELConfig))
_S2FT = partial(S2FTConfig, heads=2, channels=64, seed=3)
_SPIEL = partial(
    SpIELConfig, num_tunable_weights=1500, seed=3, reselection_steps=3, accumulation_steps=1
)
WAYS = {f"s2ft-{m}-{layout}": partial(_S2FT, mode=m, layout=layout) for m, layout in COMBINATIONS}
WAYS |= {f"spiel-{mode}": partial(_SPIEL, mode=mode) for mode in MODES}
EVERY_WAY = pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)


def layers(model):
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def deltas(model, name="default"):
    return [layer.deltas[name] for layer in layers(model) if name in layer.modes]


def randomized(model, name="default", seed=7):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in deltas(model, name):
            noise = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
            delta.copy_(0.3 * noise)
    return model


def train(model, steps, lr=1e-2):
    """At a rate that moves the model far, of SpIEL with reselections; returns the losses."""
    is_spiel = isinstance(model.peft_config["default"], SpIELConfig)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, lr) if is_spiel else torch.optim.AdamW(trained, lr)
    tuner = SpIELTuner(model, optimizer, total_steps=40) if is_spiel else None
    ids, losses = token_ids(batch=3), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if tuner is not None:
            tuner.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if tuner is not None:
        tuner.close()
    return losses
