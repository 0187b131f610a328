"""Fused steps under checkpoints, autocast, compile and processes, and what they keep in memory."""

import warnings

import pytest
import torch
from fused_models import EVERY_SETTING, adapted, assert_close, blocks, gradients, taken
from numerics import assert_as_accurate
from peft import get_peft_model
from tiny_models import tiny_model, token_ids
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.models.llama import modeling_llama

from bench.measure.memory import kept_by
from s2kernels.peft import S2FTConfig, S2FTLinear

pytestmark = pytest.mark.usefixtures("joined_as_on_a_gpu")


@EVERY_SETTING
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_checkpointing(mode, layout, use_reentrant, calls):
    want = gradients(adapted(mode=mode, layout=layout, fuse=False).train())
    model = adapted(mode=mode, layout=layout).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_close(gradients(model), want)
    assert len(calls) == 4


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
    model.state_dict()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close((loss.detach(), grads), want)


@pytest.mark.slow
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
    assert taken(calls) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        model.zero_grad()
        loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    assert len(calls) == 0 or not fullgraph
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close((loss.detach(), grads), want)


def test_generate(calls):
    ids = token_ids()
    fields = dict(max_new_tokens=6, do_sample=False)
    want = adapted(fuse=False).generate(input_ids=ids, **fields)
    assert torch.equal(adapted().generate(input_ids=ids, **fields), want)
    assert len(calls) == 2 * 6


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_autocast(dtype, calls):
    """Over weights of either dtype; the fp64 gradients say how exact the modules are."""
    exact = gradients(adapted(fuse=False).to(dtype).double())
    results = []
    for fuse in (False, True):
        model = adapted(fuse=fuse).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(model))
    assert taken(calls) == 2
    for name, want in exact[1].items():
        eager, got = (grads[name].float() for _, grads in results)
        assert_as_accurate(got, want, eager)


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
        assert taken(calls) == 4
        assert model.base_model.keeper.obstacles.sharded


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
    assert taken(calls) == 4
    assert any(isinstance(module, S2FTLinear) for module in parallel.modules())
