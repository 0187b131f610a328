"""FFNs and projections by one Function: the same as apart, and only where it is the same."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from numerics import assert_as_accurate
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, token_ids
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from bench.memory import kept_by, storages
from s2kernels import backend
from s2kernels.autograd.joined import joined
from s2kernels.peft import S2FTConfig, S2FTLinear, fused, projections
from s2kernels.peft.fused import FusedFFN
from s2kernels.peft.projections import Projection

GATED_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "qwen3_moe")
SETTINGS = [
    ("inplace", "permute"),
    ("inplace", "gather"),
    ("additive", "permute"),
    ("additive", "gather"),
]
EVERY_SETTING = pytest.mark.parametrize(("mode", "layout"), SETTINGS)


@pytest.fixture(autouse=True)
def _joined(monkeypatch):
    """As on a GPU, wherever the tests run."""
    monkeypatch.setattr(backend, "prefers_joined", lambda weight: True)


@pytest.fixture
def calls(monkeypatch):
    """How often each of the two Functions was asked for."""
    counts = {"mlp": 0, "joined_linear": 0}

    def counted(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(fused, "mlp")
    counted(projections, "joined_linear")
    return counts


def taken(calls):
    """The counts since the last time."""
    counts = tuple(calls.values())
    calls.update(dict.fromkeys(calls, 0))
    return counts


def adapted(model_type="llama", dtype=torch.float64, **fields):
    """A model with random deltas, as deterministic as the tiny model is."""
    given = dict(heads=2, channels=5, seed=3) | fields
    model = get_peft_model(tiny_model(model_type, dtype), S2FTConfig(**given))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, delta in model.named_parameters():
            if "s2ft_delta" in name:
                delta.copy_(torch.randn(delta.shape, generator=generator, dtype=delta.dtype) * 0.3)
    return model


def gradients(model, ids=None, **kwargs):
    ids = token_ids() if ids is None else ids
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **kwargs).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_close(got, want, atol=1e-12):
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=atol)
    assert got[1].keys() == want[1].keys() and got[1]
    for name in want[1]:
        torch.testing.assert_close(got[1][name], want[1][name], rtol=0, atol=atol)


def blocks(model):
    return model.get_base_model().model.layers


@EVERY_SETTING
@pytest.mark.parametrize("model_type", GATED_TYPES)
def test_it_computes_what_the_modules_do(model_type, mode, layout, calls):
    fields = dict(mode=mode, layout=layout)
    want = gradients(adapted(model_type, fuse=False, **fields))
    assert taken(calls) == (0, 0)
    model = adapted(model_type, **fields)
    got = gradients(model)
    num_ffns = 1 if model_type == "qwen3_moe" else 2  # its second block is a mixture
    assert taken(calls) == (num_ffns, 0 if model_type == "phi3" else 2)
    assert_close(got, want)
    with torch.no_grad():
        logits = model(token_ids()).logits
        apart = adapted(model_type, fuse=False, **fields)(token_ids()).logits
    torch.testing.assert_close(logits, apart, rtol=0, atol=1e-12)


@EVERY_SETTING
@pytest.mark.parametrize(
    "targets",
    [
        ["gate_proj"],
        ["up_proj", "down_proj"],
        ["gate_proj", "up_proj", "down_proj", "o_proj"],
        "all-linear",
    ],
    ids=lambda targets: "+".join(targets) if isinstance(targets, list) else targets,
)
def test_whatever_is_trained(targets, mode, layout, calls):
    fields = dict(mode=mode, layout=layout, target_modules=targets)
    want = gradients(adapted(fuse=False, **fields))
    got = gradients(adapted(**fields))
    assert taken(calls) == (2, 0 if targets == "all-linear" else 2)
    assert_close(got, want)


def test_gate_and_up_and_query_and_key_lie_together(calls):
    model = adapted()
    before = sum(storages(tiny_model("llama").parameters()).values())
    for block in blocks(model):
        query, key, value = (getattr(block.self_attn, f"{name}_proj").weight for name in "qkv")
        assert joined(block.mlp.gate_proj.weight, block.mlp.up_proj.weight) is not None
        assert joined(query, key) is not None and joined(key, value) is None
    base = [p for n, p in model.named_parameters() if "s2ft_" not in n]
    assert sum(storages(base).values()) == before

    # moved, they are joined anew by the next forward
    model.to(torch.float32).to(torch.float64)
    mlp = blocks(model)[0].mlp
    assert joined(mlp.gate_proj.weight, mlp.up_proj.weight) is None
    model(token_ids())
    assert joined(mlp.gate_proj.weight, mlp.up_proj.weight) is not None
    assert sum(storages(base).values()) == before


def test_on_a_cpu_nothing_is_joined(calls, monkeypatch):
    monkeypatch.setattr(backend, "prefers_joined", lambda weight: weight.is_cuda)
    want, model = gradients(adapted(fuse=False)), adapted()
    assert_close(gradients(model), want)
    assert taken(calls) == (2, 0)
    mlp = blocks(model)[0].mlp
    assert joined(mlp.gate_proj.weight, mlp.up_proj.weight) is None


def disturbances():
    def hook(model):
        blocks(model)[0].mlp.up_proj.register_forward_hook(lambda module, args, y: None)

    def inner_hook(model):
        inner = blocks(model)[0].mlp.down_proj.base_layer
        inner.register_forward_pre_hook(lambda module, args: None)

    def backward_hook(model):
        blocks(model)[0].mlp.gate_proj.register_full_backward_hook(lambda module, dx, dy: None)

    def activation_hook(model):
        blocks(model)[0].mlp.act_fn.register_forward_hook(lambda module, args, y: None)

    def activation(model):
        blocks(model)[0].mlp.act_fn = nn.GELU()

    def own_forward(model):
        gate = blocks(model)[0].mlp.gate_proj
        gate.forward = lambda x: nn.Linear.forward(gate, x)

    def subclass(model):
        class Linear(nn.Linear):
            pass

        blocks(model)[0].mlp.gate_proj.__class__ = Linear

    def trained(model):
        blocks(model)[0].mlp.gate_proj.weight.requires_grad_()

    return [
        hook,
        inner_hook,
        backward_hook,
        activation_hook,
        activation,
        own_forward,
        subclass,
        trained,
    ]


@pytest.mark.parametrize("disturb", disturbances(), ids=lambda function: function.__name__)
def test_what_cannot_be_seen_through_is_not_fused(disturb, calls):
    want_model, model = adapted(fuse=False), adapted()
    disturb(want_model)
    disturb(model)
    want, got = gradients(want_model), gradients(model)
    assert taken(calls) == (1, 2)  # the other block still is
    assert_close(got, want)


def test_hooks_of_all_modules_keep_everything_apart(calls):
    want = gradients(adapted(fuse=False))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        model = adapted()
        got = gradients(model)
    finally:
        handle.remove()
    assert taken(calls)[0] == 0
    assert blocks(model)[0].mlp.gate_proj in seen
    assert_close(got, want)


def test_disabled_merged_and_unloaded_it_is_the_forward_of_the_class(calls):
    ids = token_ids()
    base = tiny_model("llama")
    model = adapted()
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=1e-13)
    assert taken(calls) == (0, 0)
    want = model(ids).logits
    assert taken(calls) == (2, 2)
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-12)
    assert taken(calls) == (0, 0)
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, want)
    taken(calls)

    inner = model.unload()
    assert not any("forward" in vars(module) for module in inner.modules())
    torch.testing.assert_close(inner(ids).logits, base(ids).logits, rtol=0, atol=1e-13)
    state = inner.state_dict()
    for name, value in base.state_dict().items():
        assert torch.equal(state[name], value), name
    assert taken(calls) == (0, 0)


def test_a_forward_of_something_else_is_left_alone():
    """What was there before is not replaced, and what came later is not taken off."""
    base = tiny_model("llama")
    mlp = base.model.layers[0].mlp
    own = mlp.forward = lambda x: type(mlp).forward(mlp, x)
    model = get_peft_model(base, S2FTConfig(heads=2, channels=5))
    assert mlp.forward is own
    other = blocks(model)[1].mlp
    assert isinstance(other.forward, FusedFFN)
    wrapper = other.forward = lambda x, inside=other.forward: inside(x)
    want = model(token_ids()).logits
    inner = model.unload()
    assert other.forward is wrapper
    assert torch.equal(inner(token_ids()).logits.isfinite().all(), torch.tensor(True))
    assert want.shape == inner(token_ids()).logits.shape


def test_one_adapter_of_several(calls, tmp_path):
    model = adapted()
    want = {"default": gradients(model)}
    model.save_pretrained(tmp_path)
    taken(calls)
    model.add_adapter("second", S2FTConfig(heads=2, channels=5, seed=8))
    model.add_adapter("apart", S2FTConfig(heads=2, channels=5, seed=9, fuse=False))
    assert_close(gradients(model), want["default"])
    assert taken(calls) == (2, 2)
    model.set_adapter("second")
    gradients(model)
    assert taken(calls) == (2, 2)
    model.set_adapter("apart")
    gradients(model)
    assert taken(calls) == (0, 0)
    model.base_model.set_adapter(["default", "second"])
    gradients(model)
    assert taken(calls) == (0, 0)
    with torch.no_grad():
        names = ["default", "__base__"]
        mixed = model.eval()(token_ids(), adapter_names=names).logits
    assert taken(calls) == (0, 0)
    assert mixed.isfinite().all()
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].fuse is True
    assert_close(gradients(loaded), want["default"])
    assert taken(calls) == (2, 2)


def test_adapters_that_differ_in_where_they_train_are_not_fused(calls):
    """gate and down train other channels here, which `mlp` has no words for."""
    layer = "model.layers.0.mlp."
    for down, num_fused in (([1, 7, 30], 1), ([30, 2, 7], 0), ([1, 7], 0)):
        indices = {f"{layer}gate_proj": [1, 7, 30], f"{layer}down_proj": down}
        fields = dict(target_modules=["gate_proj", "down_proj"], indices=indices, layout="gather")
        got, want = (gradients(adapted(fuse=fuse, **fields)) for fuse in (True, False))
        assert_close(got, want)
        assert taken(calls)[0] == num_fused


def test_an_adapter_that_is_active_in_some_layers_only(calls):
    fields = dict(target_modules=["gate_proj", "up_proj", "down_proj"])
    for mode in ("inplace", "additive"):
        results = []
        for fuse in (False, True):
            model = adapted(fuse=fuse, mode=mode, **fields)
            blocks(model)[0].mlp.up_proj.set_adapter("none of this name")
            results.append(gradients(model))
        assert_close(results[1], results[0])
        assert taken(calls)[0] == 2


def test_indices_that_are_loaded_later(calls):
    fields = dict(target_modules=["gate_proj", "down_proj"], layout="gather")
    model, apart = adapted(**fields), adapted(fuse=False, **fields)
    gradients(model)
    taken(calls)
    for each in (model, apart):
        name = next(n for n, _ in each.named_buffers() if "down_proj.s2ft_index" in n)
        each.load_state_dict({name: torch.arange(5, dtype=torch.int32)}, strict=False)
    assert_close(gradients(model), gradients(apart))
    assert taken(calls)[0] == 1


@EVERY_SETTING
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_checkpointing(mode, layout, use_reentrant, calls):
    want = gradients(adapted(mode=mode, layout=layout, fuse=False).train())
    model = adapted(mode=mode, layout=layout).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_close(gradients(model), want)
    assert calls["mlp"] == 4


@EVERY_SETTING
def test_saved_tensors_on_the_cpu_and_a_kept_graph(mode, layout):
    want = gradients(adapted(mode=mode, layout=layout, fuse=False))
    model, ids = adapted(mode=mode, layout=layout), token_ids()
    with save_on_cpu():
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close((loss.detach(), got), want)


@pytest.mark.parametrize("layout", ("permute", "gather"))
def test_slices_that_were_taken_out_before_the_backward(layout, calls):
    model, ids = adapted(layout=layout, target_modules="all-linear"), token_ids()
    want = gradients(model)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    with model.disable_adapter(), torch.no_grad():
        model(ids)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close((loss.detach(), grads), want)

    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    model.state_dict()  # un-permutes
    if layout == "permute":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        return
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close((loss.detach(), grads), want)


@EVERY_SETTING
def test_copies_and_pickles(mode, layout, calls):
    model = adapted(mode=mode, layout=layout)
    want = gradients(model)
    taken(calls)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    twins.append(torch.load(file, weights_only=False))
    for twin in twins:
        assert_close(gradients(twin), want)
        assert taken(calls) == (2, 2)
        mlp = blocks(twin)[0].mlp
        assert mlp.forward.module is mlp
        assert mlp.forward.base_weights is twin.base_model.base_weights


def test_a_failed_second_adapter_leaves_the_first_one_fused(calls):
    model = adapted()
    want = gradients(model)
    taken(calls)
    with pytest.raises(ValueError, match="heads: 9 wanted"):
        model.add_adapter("second", S2FTConfig(heads=9))
    assert_close(gradients(model), want)
    assert taken(calls) == (2, 2)


def test_a_failed_conversion_leaves_no_forward_behind():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="more than two partly selected"):
        get_peft_model(model, S2FTConfig(heads=3, seed=1, layout="permute"))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("mode", "layout", "targets", "fullgraph"),
    [
        ("additive", "gather", None, True),
        ("inplace", "gather", "all-linear", False),
    ],
)
def test_compiled_it_is_the_forward_of_the_class(mode, layout, targets, fullgraph, calls):
    """Over joined weights, too, which are views of one storage and, inplace, written to."""
    torch._dynamo.reset()
    model, ids = adapted(mode=mode, layout=layout, target_modules=targets), token_ids()
    want = gradients(model)
    assert taken(calls)[0] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        model.zero_grad()
        loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    assert calls["mlp"] == 0 or not fullgraph
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close((loss.detach(), grads), want)


def test_generate(calls):
    ids = token_ids()
    fields = dict(max_new_tokens=6, do_sample=False)
    want = adapted(fuse=False).generate(input_ids=ids, **fields)
    assert torch.equal(adapted().generate(input_ids=ids, **fields), want)
    assert calls["mlp"] == calls["joined_linear"] == 2 * 6


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_autocast(dtype, calls):
    """Over weights of either dtype; the fp64 gradients say how exact the modules are."""
    exact = gradients(adapted(fuse=False).to(dtype).double())
    results = []
    for fuse in (False, True):
        model = adapted(fuse=fuse).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(model))
    assert taken(calls) == (2, 2)
    for name, want in exact[1].items():
        eager, got = (grads[name].float() for _, grads in results)
        assert_as_accurate(got, want, eager)


def test_what_a_weight_shares_is_not_joined(calls):
    base = tiny_model("llama")
    layers = base.model.layers
    layers[1].mlp.gate_proj.weight = layers[0].mlp.gate_proj.weight
    want = gradients(
        get_peft_model(copy.deepcopy(base), S2FTConfig(heads=2, channels=5, fuse=False))
    )
    model = get_peft_model(base, S2FTConfig(heads=2, channels=5))
    assert_close(gradients(model), want)
    assert taken(calls)[0] == 2
    assert layers[0].mlp.gate_proj.weight is layers[1].mlp.gate_proj.weight
    assert joined(layers[0].mlp.gate_proj.weight, layers[0].mlp.up_proj.weight) is None


@pytest.mark.parametrize("how", ("merge_and_unload", "unload"))
def test_the_base_is_saved_as_ever(how, tmp_path):
    ids = token_ids()
    model = getattr(adapted(dtype=torch.float32), how)()
    want = model(ids).logits
    model.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, want)
    save_file(model.state_dict(), tmp_path / "alone.safetensors")
    sizes = [(tmp_path / "alone.safetensors").stat().st_size]
    state = load_file(tmp_path / "alone.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert sizes[0] < 1.2 * sum(v.numel() * 4 for v in state.values())


# q, k and v


class Attention(nn.Module):
    """The q, k, v of an adapted attention, apart from it."""

    def __init__(self, model):
        super().__init__()
        attention = blocks(model)[0].self_attn
        self.query, self.key, self.value = (getattr(attention, f"{name}_proj") for name in "qkv")
        assert isinstance(self.query.forward, Projection)
        self.inputs = self.query.forward.inputs


def test_projections_in_any_order_and_of_any_input(calls):
    own = Attention(adapted())
    x, other = (torch.randn(2, 3, 32, dtype=torch.float64) for _ in range(2))

    def check(module, x):
        torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight, module.bias))

    for module in (own.query, own.key, own.value):
        check(module, x)
    assert taken(calls) == (0, 1) and own.inputs._waiting is None
    for module in (own.value, own.key):
        check(module, x)
    assert taken(calls) == (0, 0)
    check(own.query, x)
    check(own.key, other)
    check(own.value, x.clone())
    check(own.value, x)
    check(own.value, x)
    check(own.key, x)
    assert taken(calls) == (0, 1) and own.inputs._waiting is None


def test_what_changed_between_the_calls_is_not_handed_out(calls):
    own = Attention(adapted())
    x = torch.randn(2, 3, 32, dtype=torch.float64)

    def key_after(change):
        own.query(x)
        change()
        y = own.key(x)
        torch.testing.assert_close(y, nn.functional.linear(x, own.key.weight, own.key.bias))
        return y

    key_after(lambda: x.mul_(2))
    with torch.no_grad():
        key_after(lambda: own.key.weight.mul_(2))
    x.requires_grad_()
    with torch.no_grad():
        own.query(x)
    y = own.key(x)
    assert y.requires_grad
    own.query(x)
    with torch.no_grad():
        assert not own.key(x).requires_grad


def test_hooks_of_a_projection_may_change_its_output(calls):
    """In place, too, which autograd forbids for an output that is one of several views."""
    results = []
    for fuse in (False, True):
        model = adapted(fuse=fuse)
        model.enable_input_require_grads()
        blocks(model)[0].self_attn.k_proj.register_forward_hook(lambda module, args, y: y.mul_(2))
        results.append(gradients(model))
    assert_close(results[1], results[0])
    assert taken(calls) == (2, 1)


def test_a_weight_that_a_hook_fetches_is_not_read_before(calls):
    """As ZeRO-3 of DeepSpeed does it: until the module is called, its weight is empty."""
    model = adapted()
    want = gradients(model)
    taken(calls)
    key = blocks(model)[0].self_attn.k_proj
    whole, key.weight.data = key.weight.data, key.weight.data.new_empty(0)
    key.register_forward_pre_hook(lambda module, args: setattr(module.weight, "data", whole))
    assert_close(gradients(model), want)
    assert taken(calls) == (2, 1)


def test_what_nobody_asks_for_dies_with_the_input():
    own = Attention(adapted())
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True) * 1
    y = own.query(x)
    waiting = [weakref.ref(out) for out, *_ in own.inputs._waiting.outputs.values()]
    assert all(ref() is not None for ref in waiting)
    del y, x
    gc.collect()
    assert own.inputs._waiting is None
    assert all(ref() is None for ref in waiting)


def test_a_step_keeps_nothing_alive():
    model, ids = adapted(dtype=torch.float32).train(), token_ids()
    model(ids)
    kept = kept_by(lambda: model(input_ids=ids, labels=ids).loss, model)
    assert kept.unseen == 0
    for block in blocks(model):
        assert block.self_attn.q_proj.forward.inputs._waiting is None


# memory


class _Norm(torch.autograd.Function):
    """RMSNorm as one op: it saves x and one number a token."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        normed, scaled = x * rstd, (dy * weight).float()
        dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return dx.to(x.dtype), None, None


class _Rotation(torch.autograd.Function):
    """RoPE as one op: it saves nothing."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.table = cos, sin
        return x * cos.unsqueeze(1) + modeling_llama.rotate_half(x) * sin.unsqueeze(1)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = (part.unsqueeze(1) for part in ctx.table)
        return dy * cos - modeling_llama.rotate_half(dy * sin), None, None


def test_a_layer_of_llama_2_7b_keeps_what_its_limit_says(monkeypatch):
    """With pointwise ops fused, in bytes a token: the inputs of two norms, q, k, v and the output
    of attention, gate and up; 92.1 KiB if the slices of o_proj and down_proj are kept besides.
    """
    monkeypatch.setattr(
        modeling_llama.LlamaRMSNorm,
        "forward",
        lambda norm, x: _Norm.apply(x, norm.weight, norm.variance_epsilon),
    )
    monkeypatch.setattr(
        modeling_llama,
        "apply_rotary_pos_emb",
        lambda q, k, cos, sin, **_: (_Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)),
    )
    scale, heads, tokens = 16, 32, 24
    sizes = dict(
        hidden_size=4096 // scale,
        intermediate_size=11008 // scale,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        attention_bias=False,
        mlp_bias=False,
    )
    kept, grads = {}, {}
    for fuse in (False, True):
        model = tiny_model("llama", torch.bfloat16, **sizes)
        model = get_peft_model(model, S2FTConfig(heads=2, channels=256 // scale, fuse=fuse)).train()
        (block,) = blocks(model)
        x = torch.randn(1, tokens, 4096 // scale).bfloat16().requires_grad_()
        rotary = model.get_base_model().model.rotary_emb
        table = rotary(x, torch.arange(tokens).unsqueeze(0))

        def step(block=block, x=x, table=table):
            return block(x * 1, position_embeddings=table)

        step()  # the base slices exist from the first one on
        kept[fuse] = kept_by(step, block)
        step().float().square().sum().backward()
        grads[fuse] = [p.grad for p in block.parameters() if p.requires_grad]
    assert len(grads[True]) == 2 and all(grad.any() for grad in grads[True])

    def of_token(scale):
        """bf16; two rstd and a log-sum-exp for each head in fp32; the slice of o_proj."""
        return (6 * 4096 + 2 * 11008 + 256) // scale * 2 + 4 * (2 + heads)

    assert (kept[True].saved, kept[True].unseen) == (tokens * of_token(scale), 0)
    assert of_token(1) / 1024 == 91.6328125 and of_token(1) / 1024 < 92.1
    # apart: silu(gate) and the slice of down_proj
    assert kept[False].saved - kept[True].saved == tokens * (11008 + 256) // scale * 2


# processes


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_fsdp2(alone, calls):
    """Its weights are gathered for each forward: they are used, and not moved."""
    want = gradients(adapted(fuse=False, layout="gather", mode="additive"))
    for layout in ("auto", "gather"):
        model = adapted(layout=layout)
        mesh = init_device_mesh("cpu", (1,))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for _ in range(2):
            loss, grads = gradients(model)
            full = {name: grad.full_tensor() for name, grad in grads.items()}
            assert_close((loss, full), want)
        assert taken(calls) == (4, 4)
        assert model.base_model.base_weights._sharded


def test_ddp(alone, calls):
    want = gradients(adapted(fuse=False))
    model = adapted()
    parallel = nn.parallel.DistributedDataParallel(model)
    ids = token_ids()
    for _ in range(2):
        model.zero_grad()
        loss = parallel(input_ids=ids, labels=ids).loss
        loss.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close((loss.detach(), got), want)
    assert taken(calls) == (4, 4)
    assert any(isinstance(module, S2FTLinear) for module in parallel.modules())
