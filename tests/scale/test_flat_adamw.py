"""FlatAdamW over parameters that FSDP2 has sharded."""

import copy

import pytest
import torch
from sharded_models import adapted, distance, shard, train, trained, values
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from s2kernels.flat import FlatAdamW


def _sharded(rank, clip):
    found = []
    for make in (FlatAdamW, torch.optim.AdamW):
        model = shard(adapted("s2ft", channels=7))
        optimizer = make(trained(model), lr=1e-2)
        losses = train(model, 5, rank, 2, optimizer, clip)
        p = trained(model)[0]
        assert isinstance(p, DTensor) and optimizer.state[p]["exp_avg"].placements == p.placements
        found.append((losses, values(model)))
    return found


@pytest.mark.parametrize("clip", (None, 0.05))
def test_sharded_parameters_are_trained_as_on_one_process(ranks, clip):
    model = adapted("s2ft", channels=7)
    losses = train(model, optimizer=FlatAdamW(trained(model), lr=1e-2), clip=clip)
    unclipped = adapted("s2ft", channels=7)
    train(unclipped)
    for found in ranks.run(_sharded, clip):
        for got, deltas in found:
            assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) < 2e-6
            assert distance(values(model), deltas) < 1e-5
            if clip is not None:
                assert distance(values(unclipped), deltas) > 1e-3


def _resumed(rank):
    """FlatAdamW and torch's AdamW take each other's states, and zero_grad keeps gradients."""
    model = shard(adapted("s2ft"))
    optimizer = FlatAdamW(trained(model), lr=1e-2, accumulate_in_backward=True)
    train(model, 2, rank, 2, optimizer)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    start = [p.detach().clone() for p in trained(model)]
    ways = []
    for make in (FlatAdamW, torch.optim.AdamW):
        with torch.no_grad():
            for p, value in zip(trained(model), start, strict=True):
                p.copy_(value)
        other = make(trained(model), lr=1e-2)
        set_optimizer_state_dict(model, other, copy.deepcopy(saved))
        train(model, 2, rank, 2, other, seed=8)
        ways.append(values(model))
    assert distance(*ways) < 1e-6

    loss = model(input_ids=torch.ones(1, 5, dtype=torch.int64)).logits.square().sum()
    loss.backward()
    optimizer = FlatAdamW(trained(model))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.to_local().any() for p in trained(model))
    with pytest.raises(ValueError, match="plain floating parameters for step_in_backward"):
        FlatAdamW(trained(model), step_in_backward=True)


def test_states_go_over_to_torch_and_back(ranks):
    ranks.run(_resumed)
