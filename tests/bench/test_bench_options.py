"""Options of the laboratory that are the package's own: what use_fast_ops gives a model."""

import copy

import pytest
import torch
from tiny_models import tiny_model

from bench.methods import Options, Unavailable
from s2kernels import fast_ops


@pytest.fixture
def on_cuda(monkeypatch):
    """Models pass for such on a GPU that has everything."""
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(fast_ops, "_not_on_cuda", lambda model: None)
    monkeypatch.setattr(fast_ops, "_no_cudnn", lambda model: None)


def replaced(model) -> set[str]:
    """The kinds of modules with a forward of their own."""
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def test_liger_and_cudnn(on_cuda):
    model = tiny_model("llama", torch.float32)
    Options(liger=True, attention="cudnn").before(model)
    assert replaced(model) == {"LlamaForCausalLM", "LlamaRMSNorm", "LlamaAttention"}
    assert model.config._attn_implementation == fast_ops.CUDNN
    # copies, as the laboratory makes them of one model, have what the original has
    assert replaced(copy.deepcopy(model)) == replaced(model)


def test_neither():
    model = tiny_model("llama", torch.float32)
    Options().before(model)
    assert not replaced(model) and model.config._attn_implementation == "sdpa"


def test_all_or_nothing(on_cuda, monkeypatch):
    """A model that cannot have one of the ops is not measured with the others alone."""
    monkeypatch.setattr(fast_ops, "_no_cudnn", lambda model: "it is not its day")
    model = tiny_model("llama", torch.float32)
    with pytest.raises(Unavailable, match="attention: it is not its day"):
        Options(liger=True, attention="cudnn").before(model)
    assert not replaced(model)
