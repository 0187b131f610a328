"""S2FT in place under FSDP2: weights that are gathered with the slice in them."""

from collections import Counter

import pytest
import torch
from peft import get_peft_model
from sharded_models import TARGETS, adapted, base, batches, s2ft, shard, train, values
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2kernels.peft import fsdp_placement
from s2kernels.reference import slice_write

FULL = StateDictOptions(full_state_dict=True)


def placed(model, by_layer=True, **options):
    return shard(model, by_layer, shard_placement_fn=fsdp_placement(model), **options)


def adapters_in_weights(model):
    return {layer.gathered.adapter for layer in model.base_model.keeper.layers}


def _trained(rank, by_layer, fields, checkpointing):
    """Both processes have the same batches: what they train is what one process does, but for sums
    in another order.
    """
    model = adapted("s2ft", target_modules=TARGETS, mode="inplace", **fields)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = train(placed(model, by_layer))
    assert adapters_in_weights(model) == {"default"}
    return losses, values(model), get_model_state_dict(model, options=FULL)


@pytest.mark.parametrize(
    ("by_layer", "fuse", "checkpointing"),
    [(True, True, False), (False, False, False), (True, True, True)],
)
def test_it_trains_what_one_process_trains_in_place(ranks, by_layer, fuse, checkpointing):
    fields = dict(fuse=fuse, channels=7)
    model = adapted("s2ft", target_modules=TARGETS, mode="inplace", **fields)
    w0 = adapted("s2ft", target_modules=TARGETS, **fields).state_dict()
    losses = train(model)
    for got, deltas, state in ranks.run(_trained, by_layer, fields, checkpointing):
        assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) <= 1e-7
        for name, delta in values(model).items():
            assert delta.any() and (deltas[name] - delta).abs().max() <= 1e-7, name
        assert state.keys() == w0.keys()
        for name, value in w0.items():
            if not name.endswith("s2ft_delta.default"):
                assert type(state[name]) is torch.Tensor and torch.equal(state[name], value), name


class _Collectives(TorchDispatchMode):
    """Bytes of collectives, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            nbytes = max((x.numel() * x.itemsize for x in tensors), default=0)
            self.count[func.overloadpacket.__name__] += nbytes
        return func(*args, **(kwargs or {}))


def _cost(rank):
    """(collectives, bytes saved for the backward) of a step, additive and in place."""
    found = []
    for place in (shard, placed):
        model = place(adapted("s2ft", target_modules=TARGETS))
        tokens = batches(1)[0]
        model(input_ids=tokens, labels=tokens).loss.backward()
        storages = {}

        def pack(tensor, storages=storages):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = (storage.nbytes(), storage)
            return tensor

        with _Collectives() as collectives:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(input_ids=tokens, labels=tokens).loss
            saved = sum(nbytes for nbytes, _ in storages.values())
            loss.backward()
        found.append((collectives.count, saved))
    assert adapters_in_weights(model) == {"default"}
    return found


def test_it_gathers_and_saves_no_byte_more_than_additive(ranks):
    for (gathered, saved), (gathered_inplace, saved_inplace) in ranks.run(_cost):
        assert gathered and gathered_inplace == gathered
        assert 0 < saved_inplace <= saved


def _weights_in_half(rank):
    """The gathered weights after some steps, and the deltas in them."""
    model = adapted("s2ft", target_modules=TARGETS)
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    placed(model, mp_policy=policy)
    train(model, 2, rank, 2)
    deltas, found = values(model), {}
    for block in model.get_base_model().model.layers:
        block.unshard()
    for layer in model.base_model.keeper.layers:
        found[layer.name] = (
            layer.base_layer.weight.detach().clone(),
            layer.positions["default"],
            deltas[f"base_model.model.{layer.name}.s2ft_delta.default"],
            layer.dim,
        )
    return found


def test_what_is_gathered_is_rounded_once_from_fp32(ranks):
    w0 = base().bfloat16()
    for found in ranks.run(_weights_in_half):
        for name, (weight, where, delta, dim) in found.items():
            expected = w0.get_submodule(name).weight.detach().clone()
            assert delta.dtype == torch.float32 and not torch.equal(weight, expected)
            channels = expected[:, where] if dim == "in" else expected[where]
            slice_write([expected], [channels.clone()], [delta], [where], [dim])
            assert torch.equal(weight, expected), name


def _adapters(rank):
    """What the weights hold, and what comes out, as adapters are switched."""
    tokens = batches(1)[0]
    expected = base().eval()(input_ids=tokens).logits
    model = adapted("s2ft", target_modules=TARGETS)
    model.add_adapter("second", s2ft(mode="inplace", seed=2))
    placed(model)
    train(model, 2)
    model.eval()
    with torch.no_grad():
        trained_logits = model(input_ids=tokens).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=tokens).logits, expected)
        rows = model(input_ids=tokens, adapter_names=["default", "__base__"] * 4).logits
        assert adapters_in_weights(model) == {None}
        torch.testing.assert_close(rows[1::2], expected[1::2])
        torch.testing.assert_close(rows[::2], trained_logits[::2], rtol=1e-4, atol=1e-5)
        model.base_model.set_adapter("second")
        assert torch.equal(model(input_ids=tokens).logits, expected)  # its deltas are 0
        assert "second" in adapters_in_weights(model)
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match="mode='inplace', and the weight was gathered without"):
            model(input_ids=tokens)
        model.base_model.set_adapter("default")
        with pytest.raises(ValueError, match="merged into a plain dense weight"):
            model.merge_adapter()
        with pytest.raises(RuntimeError, match="call reshard"):  # the forward that has failed
            model.unload()
        for block in model.get_base_model().model.layers:
            block.reshard()
        plain = model.unload()
        assert torch.equal(plain(input_ids=tokens).logits, expected)
        state = get_model_state_dict(plain, options=FULL)
    assert all(torch.equal(state[name], value) for name, value in base().state_dict().items())


def test_weights_hold_the_active_adapter_and_no_other(ranks):
    ranks.run(_adapters)


def _stale(rank):
    """The root keeps what it gathered after a forward; nothing else may be computed with that."""
    model = placed(adapted("s2ft"), by_layer=False)
    train(model, 1)
    tokens = batches(1)[0]
    loss = model(input_ids=tokens, labels=tokens).loss
    with model.disable_adapter(), pytest.raises(RuntimeError, match="call reshard"):
        model(input_ids=tokens)
    loss.backward()
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens).logits, base().eval()(input_ids=tokens).logits)


def test_a_weight_that_was_gathered_for_something_else_is_not_used(ranks):
    ranks.run(_stale)


def _not_placed(rank):
    """Without the placement of output channels: additive where that is admitted."""
    found = []
    for mode in ("auto", "inplace"):
        model = adapted("s2ft", target_modules=TARGETS, mode=mode)
        fsdp_placement(model)
        with pytest.raises(ValueError, match="fsdp_placement was called, and the model is not"):
            train(model, 1)
        shard(model)
        if mode == "inplace":
            with pytest.raises(ValueError, match="shard_placement_fn that fsdp_placement returned"):
                train(model, 1)
            continue
        found = [train(model), values(model)]
        by_dim = {layer.dim: layer.gathered.adapter for layer in model.base_model.keeper.layers}
        assert by_dim == {"in": "default", "out": None}
    return found


def test_columns_that_are_sharded_by_rows_stay_additive(ranks):
    model = adapted("s2ft", target_modules=TARGETS)
    losses = train(model)
    for got, deltas in ranks.run(_not_placed):
        assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) < 2e-6
        for name, delta in values(model).items():
            torch.testing.assert_close(deltas[name], delta, rtol=1e-4, atol=1e-5)


HEAD = dict(target_modules=["o_proj", "lm_head"], layout="gather")


def _loaded(rank, assign):
    """Made on meta and loaded there; a head of 129 rows, of which the processes have 65 and 64."""
    with torch.device("meta"):
        model = placed(get_peft_model(base(vocab_size=129), s2ft(mode="inplace", **HEAD)))
    model.to_empty(device="cpu")
    model.get_base_model().model.rotary_emb = base().model.rotary_emb
    full = get_peft_model(base(vocab_size=129), s2ft(**HEAD)).state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full if rank == 0 else {}, options=options)
    if assign:
        model.load_state_dict(model.state_dict(), assign=True)
    return train(model), values(model), adapters_in_weights(model)


@pytest.mark.parametrize("assign", (False, True))
def test_weights_that_are_loaded_later_are_written_to_as_well(ranks, assign):
    model = get_peft_model(base(vocab_size=129), s2ft(mode="inplace", **HEAD))
    losses = train(model)
    for got, deltas, adapters in ranks.run(_loaded, assign):
        assert adapters == {"default"}
        assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) <= 1e-7
        for name, delta in values(model).items():
            assert (deltas[name] - delta).abs().max() <= 1e-7, name


def test_what_cannot_be_in_place_is_refused():
    with pytest.raises(ValueError, match="no S2FT layer whose weight can be written to"):
        fsdp_placement(adapted("s2ft", mode="additive"))
    with pytest.raises(ValueError, match="no S2FT layer"):
        fsdp_placement(adapted("spiel"))
    model = adapted("s2ft")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        fsdp_placement(model)
