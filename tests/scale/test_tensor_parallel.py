"""S2FT in a model that a tp_plan of transformers has split over two processes, beside one."""

import json
import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from sharded_models import (
    base,
    batches,
    distance,
    mesh,
    refusals,
    s2ft,
    spiel,
    train,
    trained,
    values,
    whole,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.distributed import DistributedConfig

from s2kernels.flat import FlatAdamW
from s2kernels.peft import S2FTLinear, fsdp_placement, save_pretrained, select_indices

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GQA = dict(num_attention_heads=8, num_key_value_heads=4)
HELD_OUT = batches(1, seed=9)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("base")
    base(**GQA).save_pretrained(made)
    return made


def split(folder, **options):
    """The model in `folder`, as each of two processes loads it."""
    rank = str(dist.get_rank())
    os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    try:
        plan = DistributedConfig(tp_size=2, tp_plan="auto")
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, **options)
    finally:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]


def config(**fields):
    """Two query heads of each process, and the KV heads that they read."""
    return s2ft(**dict(heads=3, target_modules=TARGETS) | fields)


def indices(model):
    layers = [module for module in model.modules() if isinstance(module, S2FTLinear)]
    return {layer.name: layer.s2ft_index["default"].tolist() for layer in layers}


def alone(chosen, inner=None, **fields):
    """What one process trains, of the same channels."""
    return get_peft_model(inner or base(**GQA), config(indices=chosen, **fields))


def frozen(model):
    inner = model.get_base_model()
    return {n: whole(p).clone() for n, p in inner.named_parameters() if not p.requires_grad}


def gradients(model):
    model(input_ids=HELD_OUT, labels=HELD_OUT).loss.backward()
    found = {n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def held_out(model):
    model.eval()
    with torch.no_grad():
        output = model(input_ids=HELD_OUT, labels=HELD_OUT)
    model.train()
    return output.logits, output.loss.item()


def logits(model):
    return held_out(model)[0]


def _trained(rank, folder, mode):
    model = get_peft_model(split(folder), config(mode=mode))
    before = frozen(model)
    first = gradients(model)
    losses = train(model)
    found = dict(losses=losses, deltas=values(model), first=first, last=gradients(model))
    found["logits"], found["loss"] = held_out(model)
    model.state_dict()  # which gives W0 back
    after = frozen(model)
    found["kept"] = before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    with model.disable_adapter():
        found["disabled"] = logits(model)
    return found | dict(indices=indices(model))


@pytest.mark.parametrize("mode", ("additive", "inplace"))
def test_two_processes_train_what_one_does(ranks, folder, mode):
    found = ranks.run(_trained, folder, mode)
    chosen = found[0]["indices"]
    model = alone(chosen, mode=mode)
    first = gradients(model)
    losses, last = train(model), gradients(model)
    wanted, loss = held_out(model)
    for there in found:
        assert there["indices"] == chosen and there["kept"]
        assert max(abs(a - b) for a, b in zip(there["losses"], losses, strict=True)) <= 2e-6
        assert abs(there["loss"] - loss) <= 2e-6
        torch.testing.assert_close(there["logits"], wanted, rtol=0, atol=1e-5)
        assert distance(first, there["first"]) < 1e-5
        assert distance(last, there["last"]) < 1e-5
        assert distance(values(model), there["deltas"]) < 1e-5
        torch.testing.assert_close(there["disabled"], logits(base(**GQA)), rtol=0, atol=1e-5)
    assert (wanted - logits(base(**GQA))).abs().max() > 0.1


def test_each_part_trains_the_same_number_of_whole_heads_and_channels(ranks, folder):
    for found in ranks.run(_drawn, folder):
        for name, index in found.items():
            size = dict(q=64, k=32, v=32, o=64).get(name.split(".")[-1][0], 192)
            index = torch.tensor(index)
            half = len(index) // 2
            assert torch.equal(index[half:], index[:half] + size // 2)
            assert (index[:half] < size // 2).all()
            if "self_attn" in name:
                heads = index.view(-1, 8)
                assert torch.equal(heads, heads[:, :1] // 8 * 8 + torch.arange(8))
                assert len(heads) in ((4,) if name.split(".")[-1][0] in "qo" else (2, 4))
            else:
                assert len(index) == 8


def _drawn(rank, folder):
    inner = split(folder)
    chosen = select_indices(inner, config(channels=7)).indices
    model = get_peft_model(inner, config(channels=7))
    assert indices(model) == chosen
    assert all(
        isinstance(p, DTensor) and p.to_local().numel() * 2 == p.numel() for p in trained(model)
    )
    return chosen


def _clipped(rank, folder):
    found = []
    for make in (torch.optim.SGD, FlatAdamW):
        model = get_peft_model(split(folder), config())
        optimizer = make(trained(model), lr=1e-2 if make is FlatAdamW else 1.0)
        losses = train(model, optimizer=optimizer, clip=0.05 if make is torch.optim.SGD else None)
        model(input_ids=HELD_OUT, labels=HELD_OUT).loss.backward()
        norm = whole(torch.nn.utils.clip_grad_norm_(trained(model), 0.05)).item()
        state = optimizer.state[trained(model)[0]]
        if make is FlatAdamW:
            assert state["exp_avg"].placements == (Shard(0),)
        found.append((losses, values(model), norm))
    return indices(model), found


def test_norms_are_clipped_and_flat_steps_done_as_on_one_process(ranks, folder):
    for chosen, found in ranks.run(_clipped, folder):
        for make, lr, clip, (losses, deltas, norm) in zip(
            (torch.optim.SGD, torch.optim.AdamW), (1.0, 1e-2), (0.05, None), found, strict=True
        ):
            model = alone(chosen)
            wanted = train(model, optimizer=make(trained(model), lr=lr), clip=clip)
            assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) <= 2e-6
            assert distance(values(model), deltas) < 1e-5
            model(input_ids=HELD_OUT, labels=HELD_OUT).loss.backward()
            expected = torch.nn.utils.clip_grad_norm_(trained(model), 0.05).item()
            assert norm == pytest.approx(expected, rel=1e-5) and expected > 0.1
        unclipped = alone(chosen)
        train(unclipped, optimizer=torch.optim.SGD(trained(unclipped), lr=1.0))
        assert distance(values(unclipped), found[0][1]) > 0.1


def _saved(rank, folder, adapter):
    model = get_peft_model(split(folder), config())
    train(model)
    save_pretrained(model, adapter)
    wanted = logits(model)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(
            split(folder), adapter, low_cpu_mem_usage=low, is_trainable=True
        )
        assert torch.equal(logits(loaded), wanted)
    before = values(model)
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-5)
    loaded.unmerge_adapter()
    assert torch.equal(logits(loaded), wanted)
    train(loaded, 1)
    assert distance(values(loaded), before) > 1e-3
    after = logits(loaded)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), after, rtol=0, atol=1e-5)
    return wanted, indices(model)


def test_an_adapter_is_saved_whole_loaded_by_one_process_and_merged_there(ranks, folder, tmp_path):
    (wanted, chosen), other = ranks.run(_saved, folder, tmp_path / "adapter")
    assert torch.equal(wanted, other[0])
    loaded = PeftModel.from_pretrained(base(**GQA), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), wanted, rtol=0, atol=1e-5)

    save_pretrained(alone(chosen), tmp_path / "alone")
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "alone")
    )
    assert {n: (v.shape, v.dtype) for n, v in ours.items()} == {
        n: (v.shape, v.dtype) for n, v in theirs.items()
    }
    for name in ours:
        assert name.endswith("_delta") or torch.equal(ours[name], theirs[name]), name


def _loaded(rank, folder, adapters):
    found = []
    for adapter in adapters:
        try:
            model = PeftModel.from_pretrained(split(folder), adapter)
            found.append(logits(model))
        except ValueError as error:
            found.append(str(error))
    save_pretrained(model, adapters[-1] / "again")
    return found


def test_an_adapter_of_one_process_is_loaded_if_it_is_balanced(ranks, folder, tmp_path):
    """Also where two processes would have drawn another number of KV heads."""
    wanted, name = [], "model.layers.1.self_attn.k_proj"
    chosen = ([*range(8), *range(8, 16)], [8, 9, 3, 28], [*range(8), *range(24, 32)])
    for number, index in enumerate(chosen):
        model = alone({name: index}, target_modules=["k_proj"])
        train(model)
        wanted.append(logits(model))
        save_pretrained(model, tmp_path / str(number))
    settings = tmp_path / "2" / "adapter_config.json"
    fields = json.loads(settings.read_text()) | dict(indices=None, heads=6)
    fields["target_modules"] = ["layers.1.self_attn.k_proj"]
    settings.write_text(json.dumps(fields))
    for found in ranks.run(_loaded, folder, [tmp_path / str(number) for number in range(3)]):
        assert f"{name}: index must name equally many channels of each of the 2 parts" in found[0]
        assert "got [16, 0]" in found[0]
        assert "got [3, 1]" in found[1]
        torch.testing.assert_close(found[2], wanted[2], rtol=0, atol=1e-5)
    again = PeftModel.from_pretrained(base(**GQA), tmp_path / "2" / "again")
    torch.testing.assert_close(logits(again), wanted[2], rtol=0, atol=1e-5)


def _on_another_base(rank, folder, adapter):
    inner = split(folder)
    if rank == 1:
        inner.model.layers[0].mlp.down_proj.weight.to_local().data.mul_(1.1)
    with pytest.raises(ValueError, match="down_proj: the adapter was trained on another base"):
        logits(PeftModel.from_pretrained(inner, adapter))


def test_all_processes_refuse_another_base_of_which_one_has_found_out(ranks, folder, tmp_path):
    chosen, _ = ranks.run(_drawn, folder)
    save_pretrained(alone(chosen), tmp_path / "adapter")
    ranks.run(_on_another_base, folder, tmp_path / "adapter")


def _checkpoint(rank, folder, checkpoint):
    model = get_peft_model(split(folder), config())
    train(model)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=checkpoint)
    other = get_peft_model(split(folder), config())
    _resume(other, checkpoint)
    assert torch.equal(logits(other), logits(model))
    return logits(model), indices(model)


def _resume(model, checkpoint, **options):
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=checkpoint, **options)
    set_model_state_dict(model, state["model"])


def test_a_checkpoint_of_two_processes_goes_on_in_two_and_in_one(ranks, folder, tmp_path):
    for wanted, chosen in ranks.run(_checkpoint, folder, tmp_path / "checkpoint"):
        model = alone(chosen)
        _resume(model, tmp_path / "checkpoint", no_dist=True)
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)


def _biased(rank, folder):
    model = get_peft_model(split(folder), config())
    losses = train(model)
    for p in model.parameters():
        p.requires_grad_(False)
    tokens = HELD_OUT[:2, :6]
    with_grad = model(input_ids=tokens).logits
    with torch.no_grad():
        without = model(input_ids=tokens).logits
    return losses, indices(model), with_grad, without


def test_biases_are_added_once(ranks, tmp_path):
    fields = GQA | dict(attention_bias=True, mlp_bias=True)
    inner = base(**fields)
    with torch.no_grad():
        for name, value in inner.named_parameters():
            if name.endswith("bias"):
                value.normal_(generator=torch.Generator().manual_seed(len(value)))
    inner.save_pretrained(tmp_path)
    for losses, chosen, with_grad, without in ranks.run(_biased, tmp_path):
        model = alone(chosen, AutoModelForCausalLM.from_pretrained(tmp_path))
        wanted = train(model)
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) <= 2e-6
        expected = model(input_ids=HELD_OUT[:2, :6]).logits
        for got in (with_grad, without):
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def _step_between(rank, folder):
    model = get_peft_model(split(folder), config(mode="additive"))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    model(input_ids=HELD_OUT, labels=HELD_OUT).loss.backward()
    loss = model(input_ids=HELD_OUT, labels=HELD_OUT).loss
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_between_forward_and_backward_is_noticed(ranks, folder):
    ranks.run(_step_between, folder)


def _refusals(rank, folder, mixture):
    said, ask = refusals()

    def adapt(**fields):
        return get_peft_model(split(folder), s2ft(**fields))

    ask("permute", lambda: adapt(layout="permute"))
    ask("whole modules", lambda: adapt(modules_to_save=["norm"]))
    ask("scores", lambda: adapt(selection="weight"))
    ask("calibrated", lambda: select_indices(split(folder), s2ft(selection="product"), [HELD_OUT]))
    ask("experts", lambda: get_peft_model(split(mixture), s2ft()))
    ask("axis", lambda: adapt(layout="gather", target_modules=["lm_head"]))
    ask("blocks", lambda: adapt(layout="block", channels=64))
    quantized = BitsAndBytesConfig(load_in_4bit=True)
    ask(
        "quantized",
        lambda: get_peft_model(split(folder, quantization_config=quantized), s2ft()),
    )
    ask("spiel", lambda: get_peft_model(split(folder), spiel()))
    by_hand = {"model.layers.*.self_attn.o_proj": RowwiseParallel()}
    ask("by hand", lambda: get_peft_model(parallelize_module(base(), mesh(), by_hand), s2ft()))

    model = adapt()
    ask("rows", lambda: model.eval()(HELD_OUT, adapter_names=["default"] * len(HELD_OUT)))
    ask("weighted", lambda: model.base_model.add_weighted_adapter(["default"], [1.0], "sum"))
    ask("placement", lambda: fsdp_placement(model))
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    ask("dense delta", lambda: layer.get_delta_weight("default"))
    layer.base_layer.weight.requires_grad_(True)
    ask("trained base", lambda: model(HELD_OUT))
    layer.base_layer.weight.requires_grad_(False)
    fully_shard(model, mesh=model.get_base_model()._device_mesh["fsdp"])
    ask("fsdp", lambda: model(HELD_OUT))
    return said


def test_what_would_be_wrong_is_refused(ranks, folder, tmp_path):
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    for said in ranks.run(_refusals, folder, tmp_path):
        assert "experts are not trained under tensor parallelism" in said["experts"]
        assert "use layout='gather'" in said["permute"]
        assert "leave out modules_to_save, got ['norm']" in said["whole modules"]
        for name in ("scores", "calibrated"):
            assert "selection must be 'random' in scope 'layer'" in said[name]
        assert "lm_head cannot be trained under tensor parallelism" in said["axis"]
        assert "which needs a multiple of 128" in said["blocks"]
        assert "got a Linear4bit" in said["quantized"]
        for name in ("spiel", "by hand", "placement"):
            assert "shard it by FSDP2 once the adapter is added" in said[name]
        assert "adapter_names does not go with tensor parallelism" in said["rows"]
        assert "combine them in a model without a tp_plan" in said["weighted"]
        assert "load it without a tp_plan" in said["dense delta"]
        assert "its weight is trained whole" in said["trained base"]
        assert "FSDP has sharded a model that is split by tensor parallelism" in said["fsdp"]
