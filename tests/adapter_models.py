"""What tests of both tuners ask of a model with adapters."""

import pytest
import torch

from s2kernels.peft import S2FTConfig, SpIELConfig
from s2kernels.peft.host.layer import AdapterLayer

EVERY_CONFIG = pytest.mark.parametrize("config", (S2FTConfig, SpIELConfig))


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
