"""S2FT in place under FSDP2: weights that are gathered with the slice in them."""

import pytest
import torch
from sharded_models import TARGETS, adapted, base, batches, mesh, shard, train, trained, values, whole
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy

from s2kernels.peft import fsdp_placement


def inplace(rank, by_layer=True, dtype=torch.float32, checkpointing=False, options=None, **fields):
    """Both processes have the same batches: what they train is what one process does, bit for bit
    but for sums in another order.
    """
    model = adapted("s2ft", target_modules=TARGETS, **fields).to(dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    placement = fsdp_placement(model)
    shard(model, by_layer, shard_placement_fn=placement, **(options or {}))
    losses = train(model)
    full = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=full)
    modes = {layer.gathered.adapter for layer in model.base_model.keeper.layers}
    return losses, values(model), state, modes


@pytest.mark.parametrize("by_layer", (True, False))
@pytest.mark.parametrize("fuse", (True, False))
def test_what_is_trained_is_what_one_process_trains_in_place(ranks, by_layer, fuse):
    fields = dict(fuse=fuse, mode="inplace", channels=7)
    model = adapted("s2ft", target_modules=TARGETS, **fields)
    losses, w0 = train(model), adapted("s2ft", target_modules=TARGETS, **fields).state_dict()
    for got, deltas, state, modes in ranks.run(_inplace_case, by_layer, fields):
        assert modes == {"default"}
        assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) <= 1e-7
        for name, delta in values(model).items():
            assert (deltas[name] - delta).abs().max() <= 1e-7, name
        for name, value in w0.items():
            if "delta" not in name and "fingerprint" not in name:
                assert torch.equal(state[name], value), name


def _inplace_case(rank, by_layer, fields):
    return inplace(rank, by_layer, **fields)
