"""Adapters of sharded models on disk: for one process, and for another number of processes."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from sharded_models import CONFIGS, adapted, base, batches, distance, shard, train, trained, values
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from s2kernels.peft import save_pretrained


def _save(rank, method, folder):
    model = adapted(method)
    model.add_adapter("second", CONFIGS[method](mode="additive"))
    if method == "s2ft":  # that is not trained is saved, too
        torch.nn.init.ones_(
            model.get_base_model().model.layers[1].mlp.down_proj.s2ft_delta["second"]
        )
    shard(model)
    train(model, rank=rank, world=2)
    save_pretrained(model, folder)
    model.eval()
    with torch.no_grad():
        return model(input_ids=batches(1, seed=9)[0]).logits


@pytest.mark.parametrize("method", CONFIGS)
def test_a_sharded_adapter_is_saved_by_all_and_loaded_by_one(ranks, tmp_path, method):
    wanted, other = ranks.run(_save, method, tmp_path / "adapter")
    assert torch.equal(wanted, other)
    tokens = batches(1, seed=9)[0]
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, wanted, rtol=0, atol=1e-5)
    effect = (base().eval()(input_ids=tokens).logits - wanted).abs().max()
    assert effect > 0.01
    alone = adapted(method)
    alone.add_adapter("second", CONFIGS[method](mode="additive"))
    save_pretrained(alone, tmp_path / "alone")
    for file in ("adapter_model.safetensors", "second/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / folder / file) for folder in ("adapter", "alone"))
        assert {n: (v.shape, v.dtype) for n, v in ours.items()} == {
            n: (v.shape, v.dtype) for n, v in theirs.items()
        }
        for name in ours:
            if not name.endswith("_delta"):
                assert torch.equal(ours[name], theirs[name]), name
    if method == "s2ft":
        name = "base_model.model.model.layers.1.mlp.down_proj.s2ft_delta"
        assert (ours[name] == 1).all()


def _fail(rank, folder):
    model = shard(adapted("s2ft"))
    try:
        save_pretrained(model, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_all_processes_fail_where_the_first_one_cannot_write(ranks, tmp_path):
    (tmp_path / "file").write_text("taken")
    first, second = ranks.run(_fail, tmp_path / "file")
    assert first.startswith("ValueError: folder must be a folder")
    assert second.startswith("RuntimeError: process 0 could not save the adapter: ValueError")
    assert (tmp_path / "file").read_text() == "taken"


def _state(model, optimizer):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def _resumed(model, folder, alone=False):
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder, no_dist=alone)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions())
    return model, optimizer


def _checkpoint(rank, method, folder):
    model = shard(adapted(method))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    train(model, 3, rank, 2, optimizer)
    dcp.save(_state(model, optimizer), checkpoint_id=folder)
    losses = train(model, 3, rank, 2, optimizer, seed=8)

    model, optimizer = _resumed(shard(adapted(method)), folder)
    assert train(model, 3, rank, 2, optimizer, seed=8) == losses
    return losses, values(model)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_checkpoint_of_two_processes_goes_on_in_two_and_in_one(ranks, tmp_path, method):
    for losses, deltas in ranks.run(_checkpoint, method, tmp_path / "checkpoint"):
        model, optimizer = _resumed(adapted(method), tmp_path / "checkpoint", alone=True)
        got = train(model, 3, optimizer=optimizer, seed=8)
        assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) < 2e-6
        assert distance(deltas, values(model)) < 1e-5


def _other_selection(rank, folder):
    """A checkpoint brings the channels along, whatever the model had drawn."""
    model = shard(adapted("s2ft"))
    train(model, 2, rank, 2)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    other = shard(get_peft_model(base(), CONFIGS["s2ft"](seed=5)))
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["model"])
    tokens = batches(1)[0]
    with torch.no_grad():
        dist.barrier()
        torch.testing.assert_close(
            other(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=0, atol=0
        )


def test_a_checkpoint_says_which_channels_are_trained(ranks, tmp_path):
    ranks.run(_other_selection, tmp_path / "checkpoint")
