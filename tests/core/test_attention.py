"""cuDNN's attention is asked for where a shape comes again, and nowhere else."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from tiny_models import checkpoint_activations, tiny_model, token_ids
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2kernels import attention, fast_ops, use_fast_ops

LAYERS = 2


@pytest.fixture
def asked(monkeypatch):
    """What each call asked torch for: "cudnn" where that is the first one, else "flash"."""
    calls = []
    names = {SDPBackend.CUDNN_ATTENTION: "cudnn", SDPBackend.FLASH_ATTENTION: "flash"}

    @contextmanager
    def kernel(backends, set_priority):
        assert set_priority and len(set(backends)) == len(backends)
        calls.append(names[backends[0]])
        assert (SDPBackend.CUDNN_ATTENTION in backends) == (calls[-1] == "cudnn")
        yield

    monkeypatch.setattr(attention, "sdpa_kernel", kernel)
    monkeypatch.setattr(fast_ops, "_no_cudnn", lambda model: None)
    return calls


def fast_model(**fields) -> nn.Module:
    model = tiny_model("llama", torch.float32, num_hidden_layers=LAYERS, **fields).eval()
    assert use_fast_ops(model, ["attention"]).on == ["attention"]
    return model


def taken(asked: list[str]) -> str:
    """What all layers of one forward asked for, or of several, one after the other."""
    groups = [asked[i : i + LAYERS] for i in range(0, len(asked), LAYERS)]
    assert all(len(group) == LAYERS and len(set(group)) == 1 for group in groups), asked
    asked.clear()
    return " ".join(group[0] for group in groups)


def test_shapes_that_come_again(asked):
    model = fast_model()
    for length in (7, 9, 7, 9, 5):
        model(token_ids(2, length))
    assert taken(asked) == "flash flash cudnn cudnn flash"
    model(token_ids(3, 7))
    model(token_ids(2, 7), attention_mask=torch.tensor([[0] * 3 + [1] * 4, [1] * 7]))
    model.to(torch.bfloat16)(token_ids(2, 7))
    assert taken(asked) == "flash flash flash"


def test_a_layer_goes_by_what_it_has_met_itself(asked):
    model = fast_model()
    model(token_ids(2, 7))
    other = copy.deepcopy(model)
    other(token_ids(2, 7))
    model(token_ids(2, 7))
    assert taken(asked) == "flash flash cudnn"


def test_generation(asked):
    """A token's key joins those before it, so that no shape comes again until the next prompt."""
    model = fast_model()
    for _ in range(3):
        model.generate(token_ids(2, 7), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert taken(asked) == " ".join(["flash"] * 4 + ["cudnn", "flash", "flash", "flash"] * 2)


def test_only_the_latest_shapes_are_remembered(asked, monkeypatch):
    monkeypatch.setattr(attention, "MAX_SHAPES", 2)
    model = fast_model()
    for length in (5, 6, 5, 7, 5, 6):
        model(token_ids(2, length))
    assert taken(asked) == "flash flash cudnn flash cudnn flash"


def test_a_captured_step_has_what_the_step_before_had(asked, monkeypatch):
    model = fast_model()
    for capturing in (False, True, True, False, True):
        monkeypatch.setattr(attention, "is_capturing", lambda capturing=capturing: capturing)
        model(token_ids(2, 7))
    assert taken(asked) == "flash flash flash cudnn cudnn"


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpoints(use_reentrant, asked):
    """What is computed once more saves the same tensors, or torch refuses it."""
    model = fast_model().train()
    checkpoint_activations(model, {"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    for _ in range(2):
        ids = token_ids(2, 7)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    again = "flash cudnn" if use_reentrant else "cudnn cudnn"
    assert taken(asked) == f"{again} cudnn cudnn"


def test_what_torch_chooses(device):
    model = tiny_model("llama", torch.float32, head_dim=8).to(device)
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        if device.type == "cuda" and backend == SDPBackend.FLASH_ATTENTION:
            model = model.to(torch.bfloat16)  # it takes no other on a GPU
        with sdpa_kernel(backend):
            choice = attention.torch_choice(model, num_tokens=64)
        assert choice.backend == backend
        assert set(choice.others) == {b for b in attention.CUDNN_FIRST if b != backend}
        assert set(choice.others.values()) == {"it is switched off"}
    choice = attention.torch_choice(model)
    lines = str(choice).splitlines()
    assert lines[0].startswith(f"torch's SDPA takes {choice.backend.name} for 8 heads and 4 of")
    assert [line.split(":")[0].strip() for line in lines[1:]] == [b.name for b in choice.others]
    assert (
        choice.others[SDPBackend.MATH] == f"it comes after {choice.backend.name} in torch's order"
    )
    assert str(use_fast_ops(model, [])) == str(choice)


def test_why_a_backend_is_not_taken(monkeypatch):
    """torch says on a GPU what it wants of each backend: as warnings, with a place in its code."""

    def unusable(params, debug):
        assert debug
        warnings.warn("Only for half types. (Triggered internally at a.cpp:3.)", stacklevel=2)
        warnings.warn("Head too wide.", stacklevel=2)
        return False

    def why_not(backend):
        return attention._why_not(backend, SDPBackend.MATH, None, True)

    monkeypatch.setitem(attention._USABLE, SDPBackend.FLASH_ATTENTION, unusable)
    assert why_not(SDPBackend.FLASH_ATTENTION) == "Only for half types.; Head too wide."
    monkeypatch.setitem(attention._USABLE, SDPBackend.CUDNN_ATTENTION, lambda params, debug: False)
    assert why_not(SDPBackend.CUDNN_ATTENTION) == "it cannot be used here"
    monkeypatch.setitem(attention._USABLE, SDPBackend.CUDNN_ATTENTION, lambda params, debug: True)
    assert why_not(SDPBackend.CUDNN_ATTENTION) == "it comes after MATH in torch's order"


def test_a_model_without_heads():
    with pytest.raises(ValueError, match="model must have a config with num_attention_heads"):
        attention.torch_choice(nn.Linear(2, 2))
