"""A linear layer to be found again by SpIEL: its data, a step, and the entries of now."""

import torch
from torch import nn

from s2kernels.peft import SpIELConfig

AG, MA = "accumulated_gradient", "momentum_approximation"


def config(**fields):
    fields = dict(num_tunable_weights=40, target_modules=["0"], seed=2) | fields
    return SpIELConfig(**fields)


def regression(shape=(24, 31), num=40, tokens=512, noise=0.0):
    """A linear layer W0, data of W0 + delta, and the `num` positions and values of that delta."""
    generator = torch.Generator().manual_seed(7)
    N, K = shape
    model = nn.Sequential(nn.Linear(K, N, bias=False, dtype=torch.float64))
    true = torch.zeros(N * K, dtype=torch.float64)
    support = torch.randperm(N * K, generator=generator)[:num].sort().values
    signs = torch.randint(0, 2, (num,), generator=generator) * 2 - 1
    true[support] = signs * (0.5 + torch.rand(num, generator=generator, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(N, K, generator=generator, dtype=torch.float64) * K**-0.5)
        x = torch.randn(tokens, K, generator=generator, dtype=torch.float64)
        y = x @ (model[0].weight + true.view(N, K)).T
        y += noise * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return model, x, y, support, true[support]


def one_step(model, optimizer, tuner, x, y, micro_batches=1, scale=1.0):
    optimizer.zero_grad()
    for part_x, part_y in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
        loss = (model(part_x) - part_y).square().sum() / len(x)
        (loss * scale).backward()
    optimizer.step()
    tuner.step()
    return loss


def layer_of(model):
    return next(m for m in model.modules() if hasattr(m, "spiel_delta"))


def index_of(model):
    return layer_of(model).spiel_index["default"]


def delta_of(model):
    return layer_of(model).spiel_delta["default"]
