"""Random adapters for tiny models, and the same model with one of them in its weights."""

import copy

import torch
from tiny_models import tiny_model

from s2kernels.adapter import Slice, fingerprint

# role -> the dimension that S2FT trains of it
DIMS = {"o_proj": "in", "down_proj": "in"} | dict.fromkeys(
    ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "out"
)
TARGETS = ("o_proj", "down_proj", "v_proj", "up_proj")


def llama(dtype=torch.float32, **fields):
    wide = dict(vocab_size=97, hidden_size=32, intermediate_size=72, max_position_embeddings=256)
    return tiny_model("llama", dtype, **wide | dict(eos_token_id=None) | fields)


def random_slices(model, seed, targets=TARGETS, most=9, scale=0.3, base=True, run=False):
    """Slices of the linear layers called so; R is drawn for each, from 1 to `most`."""
    generator = torch.Generator().manual_seed(seed)
    slices = {}
    for name, module in model.named_modules():
        role = name.rpartition(".")[2]
        if role not in targets:
            continue
        N, K = module.weight.shape
        dim = DIMS[role]
        size = K if dim == "in" else N
        R = min(size, int(torch.randint(1, most + 1, (), generator=generator)))
        if run:
            start = int(torch.randint(size - R, (), generator=generator))
            index = torch.arange(start, start + R, dtype=torch.int32)
        else:
            index = torch.randperm(size, generator=generator)[:R].int()
        shape = (N, R) if dim == "in" else (R, K)
        delta = torch.randn(shape, generator=generator) * scale
        held = module.weight.detach().index_select(1 if dim == "in" else 0, index)
        slices[name] = Slice(dim, index, delta, fingerprint(held, dim) if base else None)
    return slices


def with_slices(model, *adapters):
    """A copy of the model with base + deltas in its weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for slices in adapters:
            for name, part in slices.items():
                weight = model.get_submodule(name).weight
                weight.index_add_(part.axis, part.index.long(), part.delta.to(weight.dtype))
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}
