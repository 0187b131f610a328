"""Tiny models with an S2FT adapter, and what is asked of one in every mode and layout."""

from contextlib import nullcontext

import pytest
import torch
from model_states import base_state
from tiny_models import token_ids

from s2kernels.peft import S2FTConfig

MODES = ("inplace", "additive")
LAYOUTS = ("permute", "block", "gather")
COMBINATIONS = [(mode, layout) for mode in MODES for layout in LAYOUTS]
EVERY_COMBINATION = pytest.mark.parametrize(("mode", "layout"), COMBINATIONS)
# three blocks of 64 channels, of a mixture in each expert
WIDE = dict(intermediate_size=192, moe_intermediate_size=192)
# "all-linear" would name layers of the head, too, in encoders, and no tensors of experts.
EVERY_PROJECTION = dict.fromkeys(("bert", "roberta"), r".*\.layer\..*(query|key|value|dense)")
EVERY_PROJECTION |= dict.fromkeys(("mixtral", "qwen3_moe"), r".*_proj")


def config(**fields):
    return S2FTConfig(**dict(heads=2, channels=64, seed=3) | fields)


def deltas(model):
    return {n: p for n, p in model.named_parameters() if "s2ft_delta" in n}


def train(model, steps=20, ids=None):
    """AdamW at a rate that moves the model far; returns the losses."""
    ids = token_ids(batch=3) if ids is None else ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def randomized(model, scale=0.3):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.copy_(torch.randn(delta.shape, generator=generator, dtype=delta.dtype) * scale)
    return model


def indices(model):
    return {
        name: model.get_buffer(name.replace("s2ft_delta", "s2ft_index")).clone()
        for name in deltas(model)
    }


def assert_own_gradient_despite_a_later_pass(model, first):
    """A pass of W0, of the base or with two adapters added; then one that writes slices; only then
    its backward.
    """
    shape = (2, 9, model.config.hidden_size)
    embeds = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    embeds.requires_grad_()
    base_state(model)  # whatever is written in by now
    grads = []
    for later in (False, True):
        model.base_model.set_adapter(["default", "second"])
        with model.disable_adapter() if first == "base" else nullcontext():
            loss = model(inputs_embeds=embeds).logits.square().sum()
        if later:
            model.set_adapter("default")
            model(inputs_embeds=embeds)
            assert model.base_model.keeper.held_by_layer
        grads.append(torch.autograd.grad(loss, embeds)[0])
    assert torch.equal(*grads)
