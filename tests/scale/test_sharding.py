"""Adapters under FSDP2, FSDP1, tensor parallelism and ZeRO-3: right, or refused."""

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from sharded_models import (
    CONFIGS,
    adapted,
    base,
    batches,
    distance,
    mesh,
    refusals,
    shard,
    train,
    trained,
    values,
    whole,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


def _alone(method, **fields):
    model = adapted(method, **fields)
    return train(model), values(model)


def assert_as_alone(found, method):
    """Each process has the losses and the values of one that trains alone."""
    losses, deltas = _alone(method)
    for got, values_there in found:
        assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) < 2e-6
        assert distance(deltas, values_there) < 1e-5


def _sharded(rank, method, how):
    model = adapted(method)
    if how == "layers":
        shard(model)
    elif how == "root":
        shard(model, by_layer=False)
    elif how == "inner root":
        fully_shard(model.get_base_model(), mesh=mesh())
    losses = train(model, rank=rank, world=2)
    return losses, values(model)


@pytest.mark.parametrize("how", ("layers", "root", "inner root"))
@pytest.mark.parametrize("method", CONFIGS)
def test_fsdp2_trains_what_one_process_does(ranks, method, how):
    assert_as_alone(ranks.run(_sharded, method, how), method)


def _by_its_own_forward(rank, method, by_layer):
    """As TRL does it: a forward in the place of the model's, which calls the decoder."""
    model = adapted(method)
    inner = model.get_base_model()

    def forward(input_ids, labels=None, **options):
        logits = inner.lm_head(inner.model(input_ids).last_hidden_state)
        loss = inner.loss_function(logits, labels, vocab_size=inner.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    inner.forward = forward
    losses = train(shard(model, by_layer), rank=rank, world=2)
    return losses, values(model)


@pytest.mark.parametrize("by_layer", (True, False))
@pytest.mark.parametrize("method", CONFIGS)
def test_layers_that_another_forward_calls_notice_fsdp2(ranks, method, by_layer):
    assert_as_alone(ranks.run(_by_its_own_forward, method, by_layer), method)


def _fsdp1(rank, method, by_layer):
    policy = ModuleWrapPolicy([LlamaDecoderLayer]) if by_layer else None
    model = FullyShardedDataParallel(
        adapted(method),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        auto_wrap_policy=policy,
    )
    losses = train(model, rank=rank, world=2)
    with FullyShardedDataParallel.summon_full_params(model):
        found = {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
    return losses, found


@pytest.mark.parametrize("by_layer", (True, False))
@pytest.mark.parametrize("method", CONFIGS)
def test_fsdp1_trains_what_one_process_does(ranks, method, by_layer):
    assert_as_alone(ranks.run(_fsdp1, method, by_layer), method)


def _refusals(rank, method):
    """What is said of adapters that could not be trained right."""
    said, ask = refusals()
    inner = base()
    fully_shard(inner, mesh=mesh())
    ask("sharded before", lambda: get_peft_model(inner, CONFIGS[method]()))
    plan = {"model.layers.*.self_attn.o_proj": RowwiseParallel()}
    parallel = parallelize_module(base(), mesh(), plan)
    ask("parallel before", lambda: get_peft_model(parallel, CONFIGS[method]()))

    tokens = batches(1)[0]
    for mode in ("auto", "additive"):
        after = adapted(method, mode=mode)
        names = {"base_model.model.model.layers.*.self_attn.o_proj.base_layer": ColwiseParallel()}
        parallelize_module(after, mesh(), names)
        ask(f"parallel after, {mode}", lambda model=after: model(input_ids=tokens))

    written = adapted(method, mode="inplace")
    shard(written)
    ask("inplace", lambda: written(input_ids=tokens))
    dist.barrier()
    return said


@pytest.mark.parametrize("method", CONFIGS)
def test_what_would_be_wrong_is_refused(ranks, method):
    for said in ranks.run(_refusals, method):
        assert "add it first, then shard" in said["sharded before"]
        assert "split by tensor parallelism" in said["parallel before"]
        assert "is a DTensor where it is multiplied" in said["parallel after, auto"]
        assert "is a DTensor where it is multiplied" in said["parallel after, additive"]
        assert "mode='inplace' needs a plain dense weight: " in said["inplace"]


def _permuted(rank, by_layer):
    model = shard(adapted("s2ft", layout="permute"), by_layer=by_layer)
    with pytest.raises(ValueError, match="layout='permute' cannot be had.*FSDP"):
        train(model, 1, rank, 2)


@pytest.mark.parametrize("by_layer", (True, False))
def test_permuted_weights_are_refused(ranks, by_layer):
    ranks.run(_permuted, by_layer)


def _late(rank):
    model = adapted("s2ft")
    train(model, num=1)
    shard(model, by_layer=False)
    with pytest.raises(RuntimeError, match="sharded after its first forward"):
        train(model, num=1)


def test_a_root_that_is_sharded_while_weights_hold_an_adapter_is_refused(ranks):
    ranks.run(_late)


@pytest.mark.parametrize("mode", ("auto", "additive"))
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("has_run", (False, True))
def test_zero_3_is_refused_at_the_next_forward(method, mode, has_run):
    """As `deepspeed.initialize` marks a parameter, which stays the same object."""
    model = adapted(method, mode=mode)
    tokens = batches(1)[0]
    if has_run:
        model(input_ids=tokens)
    for i, value in enumerate(model.parameters()):
        value.ds_id = i
    with pytest.raises(ValueError, match="ZeRO-3"):
        model(input_ids=tokens)


def _looks(rank, method):
    """How often it is looked whether the model is sharded, over five steps."""
    from s2kernels.peft.host import obstacles

    counted, original = [], obstacles.is_gathered
    obstacles.is_gathered = lambda model: counted.append(1) or original(model)
    try:
        model = shard(adapted(method))
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        train(model, 1, rank, 2, optimizer)
        first = len(counted)
        train(model, 5, rank, 2, optimizer)
        assert whole(trained(model)[0]).any()
        return first, len(counted)
    finally:
        obstacles.is_gathered = original


@pytest.mark.parametrize("method", CONFIGS)
def test_it_is_decided_once_and_not_in_every_layer(ranks, method):
    for first, after in ranks.run(_looks, method):
        assert after == first <= 3
