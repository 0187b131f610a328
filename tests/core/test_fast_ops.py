"""Fast ops: what is switched on and why not, in one model alone, with the same results, undone."""

import copy
import importlib
import inspect

import pytest
import torch
import triton.language as tl
from captured_models import adamw, assert_same, batch, by_hand, record_steps
from numerics import assert_as_accurate
from peft import get_peft_model
from tiny_models import tiny_model, token_ids
from torch import nn
from torch.nn.attention import SDPBackend

from s2kernels import capture, fast_ops, use_fast_ops
from s2kernels.attention import Choice
from s2kernels.fast_blocks import LIKE_LLAMA
from s2kernels.peft import S2FTConfig

LIGER = ("rms_norm", "rope", "cross_entropy")


class Interpreted(float):
    """A number as liger-kernel's kernels take it; the interpreter hands Python's own to them."""

    def to(self, dtype):
        return self


def _tanh(x):
    doubled = 2 * x.to(tl.float64)  # in fp32 small x would cancel
    return (1 - 2 / (tl.exp(doubled) + 1)).to(tl.float32)


@pytest.fixture
def liger(monkeypatch, device):
    """liger-kernel where the tests run: without a GPU its kernels are interpreted."""
    pytest.importorskip("liger_kernel")
    if device.type == "cuda":
        return
    monkeypatch.setattr(fast_ops, "_not_on_cuda", lambda model: None)
    monkeypatch.setattr(fast_ops, "_NORM_OF_LLAMA", (Interpreted(0.0), "llama"))
    gemma = (Interpreted(1.0), "gemma")
    monkeypatch.setattr(fast_ops, "_NORMS", dict.fromkeys(fast_ops._NORMS, gemma))
    # CUDA's library of functions, which the interpreter lacks
    for name in ("rms_norm", "fused_add_rms_norm"):
        norm = importlib.import_module(f"liger_kernel.ops.{name}")
        monkeypatch.setattr(norm, "rsqrt", lambda x: tl.rsqrt(x))
    loss = importlib.import_module("liger_kernel.ops.cross_entropy")
    monkeypatch.setattr(loss, "tanh", _tanh)


@pytest.fixture
def cudnn(monkeypatch, device):
    """The attention is switched on; where there is no cuDNN, torch takes the next backend."""
    if device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        monkeypatch.setattr(fast_ops, "_no_cudnn", lambda model: None)


def small_model(model_type="llama", dtype=torch.float32, device="cpu", **config) -> nn.Module:
    """One block, one sequence: an interpreted kernel is slow."""
    model = tiny_model(model_type, dtype, num_hidden_layers=1, **config).train().to(device)
    if device == "cpu" or device.type == "cpu":
        for module in model.modules():
            for name in ("variance_epsilon", "eps"):
                if name in vars(module):
                    setattr(module, name, Interpreted(getattr(module, name)))
        if getattr(model.config, "final_logit_softcapping", None):
            model.config.final_logit_softcapping = Interpreted(model.config.final_logit_softcapping)
    return model


def tokens(device) -> torch.Tensor:
    return token_ids(1, 5).to(device)


def loss_and_gradients(model, ids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("model_type", fast_ops._FORWARDS)
def test_results_are_as_accurate(model_type, liger, device):
    """Loss and gradients of every parameter: offsets and casts of the norms are the model's."""
    model = small_model(model_type, device=device)
    plain = copy.deepcopy(model)
    exact = tiny_model(model_type, torch.float64, num_hidden_layers=1).train().to(device)
    ops = [*LIGER, "block"] if model_type in LIKE_LLAMA else LIGER
    done = use_fast_ops(model, ops)
    assert done.on == list(ops) and not done.off
    ids = tokens(device)
    losses, gradients = zip(
        *(loss_and_gradients(each, ids) for each in (model, exact, plain)), strict=True
    )
    # a loss of 5 numbers may be exact by luck: one rounding of each is allowed
    assert abs(losses[0].double() - losses[1]) < 8 * torch.finfo(torch.float32).eps * losses[1]
    for name, eager in gradients[2].items():
        assert (gradients[0][name] is None) == (eager is None), name
        if eager is None:
            continue
        expected = gradients[1][name]
        assert_as_accurate(gradients[0][name], expected, eager)


def test_another_model_is_untouched(liger, device):
    model, other = small_model(device=device), small_model(device=device)
    ids = tokens(device)
    before = loss_and_gradients(other, ids)
    use_fast_ops(model, LIGER)
    after = loss_and_gradients(other, ids)
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    assert not any("forward" in vars(module) for module in other.modules())


def test_undo(liger, cudnn, device):
    model = small_model(device=device)
    ids = tokens(device)
    before, state = loss_and_gradients(model, ids), model.state_dict().keys()
    with use_fast_ops(model) as done:
        assert done.on == list(fast_ops.OPS)
        assert model.state_dict().keys() == state
        assert model(input_ids=ids, labels=ids).logits is None
    assert done.on == []
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    after = loss_and_gradients(model, ids)
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_all_or_nothing(liger, device, monkeypatch):
    def broken(model, undo):
        raise ImportError("of another triton")

    model = small_model(device=device)
    monkeypatch.setattr(fast_ops, "_rope", broken)
    with pytest.raises(ImportError, match="of another triton"):
        use_fast_ops(model, LIGER)
    assert not any("forward" in vars(module) for module in model.modules())


def test_calls_reach_the_kernels(liger, device, monkeypatch):
    """Of norms, embeddings and loss, as often as the model has them."""
    calls = []

    def counting(module, name):
        function = getattr(importlib.import_module(module), name)
        forward = function.forward
        monkeypatch.setattr(
            function, "forward", staticmethod(lambda *a: (calls.append(name), forward(*a))[1])
        )

    counting("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    counting("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    counting("s2kernels.autograd.swiglu", "SwiGLUFunction")
    counting("liger_kernel.ops.rope", "LigerRopeFunction")
    counting("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    model = small_model(device=device)
    use_fast_ops(model, [*LIGER, "block"])
    ids = tokens(device)
    model(input_ids=ids, labels=ids)
    assert sorted(calls) == [
        "LigerFusedAddRMSNormFunction",
        "LigerFusedLinearCrossEntropyFunction",
        *["LigerRMSNormFunction"] * 2,
        "LigerRopeFunction",
        "SwiGLUFunction",
    ]


def test_with_an_adapter_and_copied(liger, device):
    """Before or after get_peft_model, and in a deep copy, which has forwards of its own."""
    ids = tokens(device)
    config = dict(heads=1, channels=4, target_modules=["q_proj", "o_proj", "down_proj"])
    gradients = []
    for when in ("never", "before", "after", "copied"):
        model = small_model(device=device)
        if when == "before":
            use_fast_ops(model, LIGER)
        model = get_peft_model(model, S2FTConfig(**config))
        if when in ("after", "copied"):
            assert use_fast_ops(model, LIGER).on == list(LIGER)
        if when == "copied":
            original, model = model, copy.deepcopy(model)
            for p in original.parameters():
                p.data.fill_(float("nan"))
        gradients.append(loss_and_gradients(model, ids)[1])
    for name, expected in gradients[0].items():
        if expected is not None:
            for other in gradients[1:]:
                torch.testing.assert_close(other[name], expected)


def test_with_fused_projections(liger, device):
    """q and k of a frozen attention may be parts of one tensor, in which RoPE must not write."""
    ids = tokens(device)
    model = get_peft_model(small_model(device=device), S2FTConfig(heads=1, channels=4))
    expected = loss_and_gradients(model, ids)[1]
    use_fast_ops(model, LIGER)
    for name, gradient in loss_and_gradients(model, ids)[1].items():
        if "s2ft_delta" in name:
            torch.testing.assert_close(gradient, expected[name])


def test_head_that_is_not_plain(liger, device):
    """A loss that reads lm_head.weight would pass an adapter or a hook by."""
    model, plain = small_model(device=device), small_model(device=device)
    use_fast_ops(model, ["cross_entropy"])
    ids = tokens(device)
    for each in (model, plain):
        each.lm_head.register_forward_hook(lambda module, args, y: y / 2)
    assert torch.equal(loss_and_gradients(model, ids)[0], loss_and_gradients(plain, ids)[0])


def test_not_while_a_graph_is_captured(liger, device, monkeypatch):
    """liger-kernel's loss asks the device how many tokens count."""
    model, plain = small_model(device=device), small_model(device=device)
    use_fast_ops(model, ["cross_entropy"])
    ids = tokens(device)
    monkeypatch.setattr(fast_ops, "is_capturing", lambda: True)
    assert model(input_ids=ids, labels=ids).logits is not None
    assert torch.equal(loss_and_gradients(model, ids)[0], loss_and_gradients(plain, ids)[0])


def test_one_loss_in_all_captured_steps(liger, device, monkeypatch):
    """Warm-ups compute the loss that is recorded, the model's own; other steps have liger's."""
    record_steps(monkeypatch, device)
    model, plain = small_model(device=device), small_model(device=device)
    use_fast_ops(model, ["cross_entropy"])
    optimizers = adamw(model), adamw(plain)
    step = capture(model, optimizers[0], warmup=2)
    for i in range(4):
        data = batch(device, i, length=5)
        assert torch.equal(step(data), by_hand(plain, optimizers[1], data)), i
    assert_same(model, plain)
    assert (step.eager, step.replays) == (2, 2)
    ids = tokens(device)
    assert model(input_ids=ids, labels=ids).logits is None


def test_signature_is_the_models(liger, device):
    """Trainer drops the columns of a data set that forward does not name."""
    model = small_model(device=device)
    use_fast_ops(model, ["cross_entropy"])
    assert inspect.signature(model.forward) == inspect.signature(type(model)(model.config).forward)


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked, cudnn, device, tmp_path):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = tiny_model("llama", dtype, head_dim=8).to(device).train()
    plain = copy.deepcopy(model)
    assert use_fast_ops(model, ["attention"]).on == ["attention"]
    assert plain.config._attn_implementation == "sdpa"
    ids = token_ids().to(device)
    inputs = {"input_ids": ids, "labels": ids}
    if masked:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :3] = 0
    model(**inputs)  # by the next backend: cuDNN is for shapes that come again
    loss, expected = (each(**inputs).loss for each in (model, plain))
    loss.backward(), expected.backward()
    tolerance = dict(rtol=0.05, atol=0.01) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(loss, expected, **tolerance)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **tolerance)
    # a saved model does not ask for it
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_nothing_on_a_cpu():
    model = tiny_model("llama", torch.float32)
    ids = token_ids()
    before = model(input_ids=ids, labels=ids)
    done = use_fast_ops(model)
    assert done.on == [] and list(done.off) == list(fast_ops.OPS)
    lines = [f"{op}: off, the model is on the device cpu" for op in fast_ops.OPS]
    assert str(done) == "\n".join([*lines, str(done.sdpa)])
    assert done.sdpa.backend.name in str(done)
    after = model(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    done.undo()


def test_reasons(monkeypatch):
    monkeypatch.setattr(fast_ops, "_not_on_cuda", lambda model: None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def reasons(model, *ops):
        return use_fast_ops(model, ops).off

    unknown = "the model type 'opt' is not among llama, mistral"
    assert reasons(tiny_model("opt", torch.float32), "rope")["rope"].startswith(unknown)
    assert reasons(nn.Linear(2, 2), "rope")["rope"].startswith("the model type None")
    assert "implementation is None" in reasons(nn.Linear(2, 2), "attention")["attention"]
    exact = tiny_model("llama", torch.float64)
    assert reasons(exact, "rms_norm") == {"rms_norm": "its kernels do not compute in fp64"}
    assert "half types, the model is in torch.float64" in reasons(exact, "attention")["attention"]
    half = tiny_model("llama", torch.bfloat16, head_dim=6)
    assert "8 divides, of 128 at most, it is 6" in reasons(half, "attention")["attention"]
    half = tiny_model("llama", torch.bfloat16, head_dim=8)
    taken = Choice(SDPBackend.CUDNN_ATTENTION, {}, "")
    with monkeypatch.context() as patch:
        patch.setattr(fast_ops, "torch_choice", lambda model: taken)
        assert reasons(half, "attention") == {"attention": "torch takes cuDNN's by itself"}
        assert half.config._attn_implementation == "sdpa"
    half.set_attn_implementation("eager")
    assert use_fast_ops(half, []).sdpa is None
    assert "implementation is 'eager'" in reasons(half, "attention")["attention"]
    half.set_attn_implementation("sdpa")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "sm_90 alone" in reasons(half, "attention")["attention"]
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert reasons(half, "attention") == {"attention": "torch has no cuDNN here"}
    assert (
        "of the model type 'gemma2' are not among llama"
        in reasons(tiny_model("gemma2", torch.float32), "block")["block"]
    )
    headless = tiny_model("llama", torch.float32).model
    headless.lm_head = None
    assert "has no lm_head" in reasons(headless, "cross_entropy")["cross_entropy"]
    norms = tiny_model("llama", torch.float32)
    norms.model.norm.forward = lambda x: x
    assert "LlamaRMSNorm has been replaced" in reasons(norms, "rms_norm")["rms_norm"]
    assert "forward" not in vars(norms.model.layers[0].input_layernorm)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reasons(norms, "rope") == {"rope": "liger-kernel is not installed"}
    with pytest.raises(ValueError, match="ops must be among rms_norm, .* got 'swiglu'"):
        use_fast_ops(norms, ["swiglu"])
