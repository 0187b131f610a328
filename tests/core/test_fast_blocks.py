"""Blocks of Llama in few kernels: what is fused, and where each part does what its class does.

Without a GPU the kernel of liger-kernel has a stand-in in torch; core/test_fast_ops.py runs it in
the interpreter.
"""

import copy
import pickle
from collections import Counter

import pytest
import torch
from captured_models import assert_same
from peft import LoraConfig, get_peft_model
from tiny_models import checkpoint_activations, tiny_model, token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2kernels import fast_ops, use_fast_ops
from s2kernels.autograd.swiglu import SwiGLUFunction
from s2kernels.fast_blocks import LIKE_LLAMA
from s2kernels.peft import S2FTConfig

LAYERS = 3
EVERYTHING = ["add_norm"] * (2 * LAYERS - 1) + ["swiglu"] * LAYERS


def add_norm(x, residual, weight, eps):
    """What liger-kernel's computes, with the casts of Llama."""
    total = x + residual
    normed = total.float() * torch.rsqrt(total.float().square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(total.dtype), total


@pytest.fixture
def calls(monkeypatch, device):
    """The fused kernels that ran, by name."""
    names = []
    fused = add_norm if device.type == "cpu" else fast_ops._add_norm

    def counted(*args):
        names.append("add_norm")
        return fused(*args)

    forward = SwiGLUFunction.forward
    monkeypatch.setattr(fast_ops, "_add_norm", counted)
    monkeypatch.setattr(
        SwiGLUFunction, "forward", staticmethod(lambda *a: (names.append("swiglu"), forward(*a))[1])
    )
    if device.type == "cpu":
        monkeypatch.setattr(fast_ops, "_no_liger", lambda model: None)
    return names


def prepared(device, model_type="llama", **fields) -> tuple[nn.Module, nn.Module]:
    """A model with fast blocks, and its twin without."""
    fields = {"num_hidden_layers": LAYERS} | fields
    model = tiny_model(model_type, torch.float32, **fields).train().to(device)
    twin = copy.deepcopy(model)
    assert use_fast_ops(model, ["block"]).on == ["block"]
    return model, twin


def results(model, ids) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_close(model, twin, ids=None) -> None:
    ids = token_ids().to(next(model.parameters()).device) if ids is None else ids
    for actual, expected in zip(results(model, ids), results(twin, ids), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", LIKE_LLAMA)
def test_every_addition_with_a_norm_behind_it_is_fused(model_type, calls, device):
    model, twin = prepared(device, model_type)
    assert_close(model, twin)
    assert sorted(calls) == EVERYTHING


class Launches(TorchDispatchMode):
    """How often each operator ran that is more than a view, save within `opaque` functions."""

    VIEWS = {"view", "_unsafe_view", "t", "transpose", "detach", "expand", "unsqueeze", "slice"}

    def __init__(self):
        super().__init__()
        self.counts, self.is_inside = Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not self.is_inside and name not in self.VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def opaque(self, function):
        def run(*args):
            self.is_inside = True
            try:
                return function(*args)
            finally:
                self.is_inside = False

        return staticmethod(run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts a stand-in's operators")
def test_what_a_block_launches_beside_products_and_fused_kernels(calls, monkeypatch):
    """Of a frozen Llama: attention, RoPE, and three sums of dx, those of q, k, v, gate and up."""
    launches = Launches()

    class AddNorm(torch.autograd.Function):
        @launches.opaque
        def forward(ctx, x, residual, weight, eps):
            ctx.save_for_backward(x)
            return add_norm(x, residual, weight, eps)

        @launches.opaque
        def backward(ctx, dy, ds):  # of about the right size
            return dy + ds, dy + ds, None, None

    class Rope(torch.autograd.Function):
        forward = launches.opaque(lambda ctx, q, k: (q.clone(), k.clone()))
        backward = launches.opaque(lambda ctx, dq, dk: (dq.clone(), dk.clone()))

    rope = pytest.importorskip("liger_kernel.transformers.rope")
    monkeypatch.setattr(rope, "liger_rotary_pos_emb", lambda q, k, cos, sin: Rope.apply(q, k))
    monkeypatch.setattr(fast_ops, "_add_norm", AddNorm.apply)
    for name in ("forward", "backward"):
        own = getattr(SwiGLUFunction, name)
        monkeypatch.setattr(SwiGLUFunction, name, launches.opaque(own))
    of_models = []
    for layers in (2, 3):
        fields = dict(num_hidden_layers=layers, attention_bias=False, mlp_bias=False)
        model = tiny_model("llama", torch.float32, **fields).train().requires_grad_(False)
        assert use_fast_ops(model, ["block", "rope"]).on == ["block", "rope"]
        x = model.model.embed_tokens(token_ids()).requires_grad_()
        launches.counts.clear()
        with launches:
            model(inputs_embeds=x, use_cache=False).logits.sum().backward()
        of_models.append(Counter(launches.counts))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert of_models[1] - of_models[0] == Counter(
        {"mm": 14, "add": 3, attention: 1, f"{attention}_backward": 1}
    )


def test_hidden_states_of_all_blocks(calls, device):
    model, twin = prepared(device)
    ids = token_ids().to(device)
    every = [each(ids, output_hidden_states=True).hidden_states for each in (model, twin)]
    assert len(every[0]) == len(every[1]) == LAYERS + 1
    for actual, expected in zip(*every, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert sorted(calls) == EVERYTHING


def test_generation(calls, device):
    model, twin = (each.eval() for each in prepared(device))
    ids = token_ids(2, 5).to(device)
    texts = [each.generate(ids, max_new_tokens=6, do_sample=False) for each in (model, twin)]
    assert torch.equal(*texts)
    assert sorted(set(calls)) == ["add_norm", "swiglu"]


@pytest.mark.parametrize("change", [lambda m, a, y: y * 1.5, lambda m, a, y: y.mul_(1.5)])
def test_a_hook_that_changes_what_a_block_gives(change, calls, device):
    """Be it a new tensor or the same one: what was handed on is the norm of another operand."""
    model, twin = prepared(device)
    for each in (model, twin):
        each.model.layers[0].register_forward_hook(change)
    with torch.no_grad():
        ids = token_ids().to(device)
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-6)
    assert sorted(calls) == EVERYTHING


@pytest.mark.parametrize("part", ["input_layernorm", "post_attention_layernorm", "mlp"])
def test_a_part_with_a_hook_is_called(part, calls, device):
    model, twin = prepared(device)
    seen = []
    for each in (model, twin):
        module = getattr(each.model.layers[1], part)
        module.register_forward_hook(lambda m, a, y: (seen.append(m), 2 * y)[1])
    assert_close(model, twin)
    assert len(seen) == 2
    missing = "swiglu" if part == "mlp" else "add_norm"
    assert len(calls) == len(EVERYTHING) - 1
    assert calls.count(missing) == EVERYTHING.count(missing) - 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_have_the_blocks_of_the_class(use_reentrant, calls, device):
    model, twin = prepared(device)
    kept = []
    for each in (model, twin):
        checkpoint_activations(each, {"use_reentrant": use_reentrant})
        if use_reentrant:
            each.enable_input_require_grads()
    assert_close(model, twin)
    assert calls == []
    for each in (model, twin):
        kept.append(0)

        def count(x):
            kept[-1] += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            results(each, token_ids().to(device))
    assert kept[0] == kept[1]


def test_one_block_that_is_checkpointed_by_hand(calls, device):
    from torch.utils.checkpoint import checkpoint

    model, twin = prepared(device)
    for each in (model, twin):
        block = each.model.layers[1]
        call = block.forward
        block.forward = lambda *args, call=call, **kwargs: checkpoint(
            call, *args, use_reentrant=False, **kwargs
        )
    assert_close(model, twin)


def test_a_graph_that_is_used_twice(calls, device):
    model, _ = prepared(device)
    ids = token_ids().to(device)
    loss = model(input_ids=ids, labels=ids).loss
    params = list(model.parameters())
    first = torch.autograd.grad(loss, params, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(loss, params), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["s2ft", "ffn_alone", "lora"])
def test_with_an_adapter(method, when, calls, device):
    """A FFN with trained slices keeps its own Function, whichever of the two comes first."""
    targets = ["q_proj", "o_proj"] if method == "s2ft" else ["up_proj", "down_proj"]
    config = {
        "s2ft": S2FTConfig(heads=1, target_modules=targets),
        "ffn_alone": S2FTConfig(channels=4, target_modules=targets),
        "lora": LoraConfig(r=2, target_modules=targets, init_lora_weights="gaussian"),
    }[method]
    model = tiny_model("llama", torch.float32, num_hidden_layers=LAYERS).train().to(device)
    plain = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    if when == "before":
        use_fast_ops(model, ["block"])
    model = get_peft_model(model, config)
    if when == "after":
        use_fast_ops(model, ["block"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(plain.get_parameter(name))
    assert_close(model, plain)
    assert calls.count("swiglu") == (0 if method == "ffn_alone" else LAYERS)
    assert calls.count("add_norm") == 2 * LAYERS - 1


def test_autocast_keeps_the_residual_stream_in_fp32(calls, device):
    model, twin = prepared(device)
    ids = token_ids().to(device)
    with torch.autocast(device.type, torch.bfloat16):
        states = [each(ids, output_hidden_states=True).hidden_states for each in (model, twin)]
    for actual, expected in zip(*states, strict=True):
        assert actual.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    assert set(calls) == {"swiglu"}


def test_norms_of_another_dtype(calls, device):
    """As prepare_model_for_kbit_training makes them."""
    model, twin = (each.to(torch.bfloat16) for each in prepared(device))
    for each in (model, twin):
        for block in each.model.layers:
            block.input_layernorm.float()
            block.post_attention_layernorm.float()
    ids = token_ids().to(device)
    with torch.autocast(device.type, torch.bfloat16):
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=0.05, atol=0.05)
    assert set(calls) == {"swiglu"}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_blocks_of_its_own(how, monkeypatch, device):
    if device.type == "cpu":
        monkeypatch.setattr(fast_ops, "_no_liger", lambda model: None)
        monkeypatch.setattr(fast_ops, "_add_norm", add_norm)
    model, twin = prepared(device)
    other = how(model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    assert_close(other, twin)


def test_a_step_trains_as_the_twin(calls, device):
    model, twin = prepared(device)
    ids = token_ids().to(device)
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            results(each, ids)
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


def test_undo(calls, device):
    model, twin = prepared(device)
    done = use_fast_ops(model, ["block"])
    assert done.off == {"block": "the forward of a LlamaDecoderLayer has been replaced already"}
    for block in model.model.layers:
        del block.forward
    with use_fast_ops(model, ["block"]):
        assert "forward" in vars(model.model.layers[0])
    assert not any("forward" in vars(module) for module in model.modules())
    assert_same(model, twin)
    assert_close(model, twin)
    assert calls == []


@pytest.mark.slow
def test_torch_compile_has_the_blocks_of_the_class(calls, device):
    model, twin = prepared(device)
    ids = token_ids().to(device)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-6)
    assert calls == []
