"""Bases that have no values yet: on the meta device, and of fake tensors."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from sharded_models import (
    CONFIGS,
    adapted,
    base,
    batches,
    distance,
    engaging_fsdp,
    shard,
    train,
    trained,
    values,
    whole,
)
from tiny_models import tiny_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.models.llama import modeling_llama

from s2kernels.peft import S2FTConfig, fsdp_placement, save_pretrained

CASES = [("s2ft", mode) for mode in ("auto", "inplace", "additive")] + [("spiel", "auto")]


@pytest.fixture
def no_mask(monkeypatch):
    """transformers reads the values of a mask, which there are none of on the meta device."""
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *_, **__: None)


def on_meta(**fields):
    with torch.device("meta"):
        return base(**fields)


def filled(model, state):
    """The model of the meta device on the CPU, with these values of its base."""
    model.to_empty(device="cpu")
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):  # computed, and not in a checkpoint
            fresh = base().model.rotary_emb
            module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
    names = {name.replace(".base_layer", ""): name for name in model.get_base_model().state_dict()}
    lost = model.get_base_model().load_state_dict(
        {names[name]: value for name, value in state.items()}, strict=False
    )
    assert not lost.unexpected_keys
    return model


@pytest.mark.parametrize(("method", "mode"), CASES)
def test_an_adapter_of_a_base_on_meta_trains_bit_for_bit_once_it_is_loaded(method, mode, no_mask):
    wanted = adapted(method, mode=mode)
    losses = train(wanted)
    model = get_peft_model(on_meta(), CONFIGS[method](mode=mode))
    outputs = model(input_ids=torch.zeros(2, 9, dtype=torch.int64, device="meta"))
    assert outputs.logits.shape == (2, 9, 128) and outputs.logits.is_meta
    filled(model, base().state_dict())
    assert train(model) == losses
    saved, expected = model.state_dict(), wanted.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


@pytest.mark.parametrize("low_memory", (False, True))
@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_from_a_file_goes_onto_a_base_on_meta(tmp_path, method, low_memory):
    model = adapted(method)
    train(model)
    save_pretrained(model, tmp_path / "adapter")
    tokens = batches(1)[0]
    wanted = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()(input_ids=tokens).logits

    path = tmp_path / "adapter"
    model = PeftModel.from_pretrained(on_meta(), path, low_cpu_mem_usage=low_memory)
    filled(model, base().state_dict())
    set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
    assert torch.equal(model.eval()(input_ids=tokens).logits, wanted)


def test_channels_that_are_no_run_and_slices_of_experts_survive_the_meta_device():
    config = dict(heads=1, channels=5, layout="gather")
    model = get_peft_model(tiny_model("mixtral"), S2FTConfig(**config))
    tokens = torch.arange(18).view(2, 9)
    for name, p in model.named_parameters():
        if "s2ft_delta" in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(3))
    wanted = model(input_ids=tokens).logits
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: value.clone() for name, value in model.named_buffers() if name not in kept}
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(kept)
    for name, value in buffers.items():
        model.get_buffer(name).copy_(value)
    torch.testing.assert_close(model(input_ids=tokens).logits, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ("auto", "additive"))
def test_a_model_of_fake_tensors_has_the_adapter_of_a_real_one(mode):
    real = adapted("s2ft", mode=mode)
    with FakeTensorMode():
        model = adapted("s2ft", mode=mode)
        tokens = torch.zeros(2, 9, dtype=torch.int64)
        model(input_ids=tokens, labels=tokens).loss.backward()
    wanted = dict(real.named_buffers())
    for name, value in model.named_buffers():
        if name.endswith(("s2ft_index.default", "s2ft_dim.default")):
            assert torch.equal(value, wanted[name])
    for name, p in model.named_parameters():
        assert isinstance(p, FakeTensor)
        if p.requires_grad:
            assert p.grad.shape == dict(real.named_parameters())[name].shape


def _loads_on_rank_0_alone(rank, method, inplace):
    with engaging_fsdp():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model = adapted(method)
        if inplace:  # the default targets are in place without a placement of their own
            fsdp_placement(model)
        if rank:
            for p in model.parameters():
                torch.nn.init.constant_(p, float("nan"))
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        losses = train(model, rank=rank, world=2, optimizer=optimizer)
        layers = model.base_model.keeper.layers
        assert not inplace or all(layer.gathered.adapter == "default" for layer in layers)
        return losses, values(model)


@pytest.mark.parametrize(("method", "inplace"), [("s2ft", False), ("s2ft", True), ("spiel", False)])
def test_accelerate_loads_the_base_on_one_process_alone(ranks, method, inplace):
    wanted = adapted(method)
    losses = train(wanted)
    for got, deltas in ranks.run(_loads_on_rank_0_alone, method, inplace):
        assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) < 2e-6
        assert distance(values(wanted), deltas) < 1e-5


def _meta_then_shard(rank, method):
    """Made on meta, sharded there, then given its values part by part, as 70B are."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with torch.device("meta"):
        model = shard(adapted(method))
    model.to_empty(device="cpu")
    assert not any(whole(p).any() for name, p in model.named_parameters() if p.requires_grad)
    model.get_base_model().model.rotary_emb = base().model.rotary_emb
    state = adapted(method).state_dict() if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    return train(model, rank=rank, world=2), values(model)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_model_is_sharded_on_meta_and_loaded_from_rank_0(ranks, method):
    wanted = adapted(method)
    losses = train(wanted)
    for got, deltas in ranks.run(_meta_then_shard, method):
        assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) < 2e-6
        assert distance(values(wanted), deltas) < 1e-5
