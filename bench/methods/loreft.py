"""LoReFT (arXiv 2404.03592): low-rank edits of the hidden state at a few positions.

At the output h (..., H) of every block, at the first and the last tokens of each sequence,

    h + Rᵀ (W h + b − R h)        R (r, H) with orthonormal rows, W (r, H), b (r,)

with one R, W, b a block for all of these positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from transformers import PreTrainedModel

from bench.methods.base import Method


class LoReFT(Method):
    """R, W and b in every block, in fp32 (fp64 in an fp64 model); the whole model is frozen."""

    name = "loreft"

    def attach(self, model: PreTrainedModel) -> nn.Module:
        torch.manual_seed(self.budget.seed)
        sizes = model.config.hidden_size, self.budget.reft_rank, self.budget.reft_positions
        dtype = torch.promote_types(model.dtype, torch.float32)
        for layer in model.model.layers:
            layer.loreft = Edit(*sizes, device=model.device, dtype=dtype)
            layer.register_forward_hook(lambda layer, args, h: layer.loreft(h))
        return model


class Edit(nn.Module):
    """The edit of one block's output. factory: device and dtype of R, W and b."""

    def __init__(self, hidden: int, rank: int, positions: int, **factory: Any) -> None:
        super().__init__()
        rotation = nn.Linear(hidden, rank, bias=False, **factory)
        nn.init.orthogonal_(rotation.weight)
        self.rotation = orthogonal(rotation)  # its weight is R
        self.source = nn.Linear(hidden, rank, **factory)  # W and b
        self.positions = positions

    def forward(self, h: Tensor) -> Tensor:
        """h (sequences, length, hidden), edited, in its dtype."""
        where = edited_positions(h.shape[1], self.positions, h.device)
        R = self.rotation.weight  # computed on each access
        at = h.index_select(1, where).to(R.dtype)
        edit = (self.source(at) - at @ R.t()) @ R
        return h.index_add(1, where, edit.to(h.dtype))


def edited_positions(length: int, count: int, device: torch.device) -> Tensor:
    """The first and the last `count` of `length` positions, half of them each at most."""
    count = min(count, length // 2)
    positions = torch.arange(length, device=device)
    return torch.cat([positions[:count], positions[length - count :]])
