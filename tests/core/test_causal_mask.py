"""A recorded step hands attention no mask where none is needed, and is_causal=True.

transformers asks torch whether a CUDA graph is captured: here it hears yes while a step is
recorded.
"""

import copy

import pytest
import recorded_ops
import torch
from captured_models import adamw, batch, by_hand, record_steps
from tiny_models import tiny_model
from torch.nn import functional as F
from transformers import masking_utils

from s2kernels import capture, fast_ops, use_fast_ops
from s2kernels.causal_mask import no_needless_mask


@pytest.fixture
def capturing(monkeypatch, device):
    """Whether a step is being recorded, as torch would say on a GPU."""
    if device.type == "cuda":
        return torch.cuda.is_current_stream_capturing
    record_steps(monkeypatch, device)
    recording = []
    record = recorded_ops.Recorder.record

    def record_as_captured(self, work):
        recording.append(True)
        try:
            return record(self, work)
        finally:
            recording.pop()

    monkeypatch.setattr(recorded_ops.Recorder, "record", record_as_captured)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(recording))
    return lambda: bool(recording)


@pytest.fixture
def received(monkeypatch, capturing):
    """Of each attention of a recorded step: whether it had a mask, and whether it was causal."""
    calls = []
    sdpa = F.scaled_dot_product_attention

    def noticing(*args, attn_mask=None, is_causal=False, **kwargs):
        if capturing():
            calls.append((attn_mask is not None, is_causal))
        return sdpa(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noticing)
    return calls


def plain(device, seed, length):
    return batch(device, seed, length)


def padded(device, seed, length):
    data = batch(device, seed, length)
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    data["attention_mask"][0, : seed % 3] = 0
    return data


def packed(device, seed, length):
    """Two sequences in a row; the first one ends elsewhere in each batch."""
    data = batch(device, seed, length)
    first = 2 + seed % 3
    positions = torch.cat([torch.arange(first), torch.arange(length - first)])
    data["position_ids"] = positions.expand(data["input_ids"].shape).to(device)
    return data


def assert_steps_are_the_loop(model, batches, exactly, **options):
    twin = copy.deepcopy(model)
    optimizers = adamw(model), adamw(twin)
    step = capture(model, optimizers[0], warmup=2, **options)
    for data in batches:
        loss, expected = step(data), by_hand(twin, optimizers[1], data)
        torch.testing.assert_close(loss, expected, **dict(rtol=0, atol=0) if exactly else {})
    assert step.replays == len(batches) - 2


NO_MASK, MASK = [(False, True)] * 2, [(True, False)] * 2  # of two blocks


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("make", [plain, padded, packed])
def test_what_attention_receives(make, use_cache, received, device):
    """With a cache transformers does not look for packed sequences, in the loop neither."""
    model = tiny_model("llama", torch.float32, use_cache=use_cache).to(device).train()
    batches = [make(device, i, 9) for i in range(5)]
    assert_steps_are_the_loop(model, batches, exactly=make is plain)
    assert received == (NO_MASK if make is plain or (make is packed and use_cache) else MASK)


@pytest.mark.parametrize("length", [3, 9])
def test_sliding_windows_keep_their_mask(length, received, device):
    """Of 4 tokens: a shorter sequence needs none."""
    model = tiny_model("mistral", torch.float32, use_cache=False).to(device).train()
    batches = [plain(device, i, length) for i in range(5)]
    assert_steps_are_the_loop(model, batches, exactly=True)
    assert received == (NO_MASK if length == 3 else MASK)


def test_positions_that_a_loss_gives_are_noticed(received, device):
    def loss(model, data):
        positions = data["input_ids"].cumsum(-1) * 0 + data["starts"]
        return model(data["input_ids"], None, positions, labels=data["labels"]).loss

    model = tiny_model("llama", torch.float32, use_cache=False).to(device).train()
    model(**plain(device, 0, 9)).loss.backward()
    step = capture(model, adamw(model), warmup=1, loss=loss)
    for i in range(2):
        data = packed(device, i, 9)
        step({**plain(device, i, 9), "starts": data["position_ids"]})
    assert received == MASK


def test_with_our_attention(received, device, monkeypatch):
    if device.type != "cuda":
        monkeypatch.setattr(fast_ops, "_no_cudnn", lambda model: None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = tiny_model("llama", dtype, head_dim=8, use_cache=False).to(device).train()
    assert use_fast_ops(model, ["attention"]).on == ["attention"]
    step = capture(model, adamw(model), warmup=2)
    for i in range(3):
        step(plain(device, i, 9))
    assert received == NO_MASK


def test_transformers_is_left_as_it_was(capturing, device):
    """Also by a step that cannot be recorded, and the model has no hooks."""
    before = dict(vars(masking_utils))
    for waits in (False, True):
        model = tiny_model("llama", torch.float32).to(device).train()

        def loss(model, data, waits=waits):
            loss = model(**data).loss
            if waits:
                loss.item()
            return loss

        step = capture(model, adamw(model), warmup=1, loss=loss)
        step(plain(device, 0, 9))
        if waits:
            with pytest.raises(RuntimeError, match="cannot be captured"):
                step(plain(device, 1, 9))
        else:
            step(plain(device, 1, 9))
        assert vars(masking_utils) == before
        assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_models_are_left_alone(compiled):
    """What they were compiled with must not be other functions while a step is recorded."""
    models = [tiny_model("llama", torch.float32) for _ in range(2)]
    if compiled:
        models[0].compile()
        models[1] = torch.compile(models[1])
    before = dict(vars(masking_utils))
    for model in models:
        with no_needless_mask(model):
            assert (vars(masking_utils) == before) == compiled
        assert vars(masking_utils) == before
