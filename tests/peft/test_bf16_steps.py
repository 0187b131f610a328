"""Steps of S2FT end to end, as a GPU computes them: a model of two layers, every mode and layout.

On a GPU the model has the widths of LLaMA-2-7B and is in bf16. Elsewhere it is small and in fp32:
the kernels run in Triton's interpreter, and weights are joined as on a GPU. Compared with the same
steps by plain torch, module by module, and in fp64: the loss of every token, the gradients of the
deltas, and that of the input. In the end the weights are what they were, to the bit.
"""

from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from fused_models import EVERY_SETTING, blocks, count_calls, taken
from numerics import assert_as_accurate
from peft import get_peft_model
from tiny_models import keep_in_fp64

from bench.steps.model_shapes import TABLE
from s2kernels import backend, reference
from s2kernels.autograd.joined import joined
from s2kernels.peft import S2FTConfig

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHAPE = TABLE["llama-2-7b"].cut(2, vocab=1024) if ON_GPU else TABLE["toy"]
CHANNELS = 176 if ON_GPU else 20  # 7B: as many parameters as LoRA of rank 16
FEW, MANY = (512, 2048) if ON_GPU else (12, 40)  # tokens
STEPS = 2
MIN_TOKENS = "MIN_TOKENS_PER_SPLIT"


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Joined weights, and MANY tokens, which slice_grad splits."""
    if not ON_GPU:
        monkeypatch.setattr(backend, "prefers_joined", lambda weight: True)
        monkeypatch.setattr(import_module("s2kernels.kernels.slice_grad"), MIN_TOKENS, 16)


@pytest.fixture(scope="module")
def bases(device):
    """The model, and its values in fp64."""
    base = SHAPE.build(MANY, DTYPE, device)
    exact = SHAPE.build(MANY, torch.float64, device)
    exact.load_state_dict({name: value.double() for name, value in base.state_dict().items()})
    keep_in_fp64(exact)
    return base, exact


@contextmanager
def ops_by(choose):
    """Whatever does not ask for an implementation gets the ops of choose()."""
    with pytest.MonkeyPatch.context() as patch:
        select = backend.select
        patch.setattr(backend, "select", lambda x, impl=None: select(x, impl) if impl else choose())
        yield


class Steps:
    """A model with an adapter, and what a step of it gives."""

    def __init__(self, base, config, choose):
        self.model, self.choose = get_peft_model(base, config), choose
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for delta in self.deltas().values():
                values = torch.randn(delta.shape, generator=generator) * 0.01
                delta.copy_(values)

    def deltas(self):
        return {n: p for n, p in self.model.named_parameters() if "s2ft_delta" in n}

    def step(self, embeds, labels):
        """(losses of the tokens, gradient of the input, those of the deltas)"""
        self.model.zero_grad()
        x = embeds.to(self.model.dtype, copy=True).requires_grad_()
        with ops_by(self.choose):
            logits = self.model(inputs_embeds=x, use_cache=False).logits.flatten(0, -2)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            losses = F.cross_entropy(wide, labels, reduction="none")
            losses.mean().backward()
        return losses.detach(), x.grad, {n: p.grad for n, p in self.deltas().items()}


@pytest.mark.parametrize("num_tokens", (FEW, MANY))
@EVERY_SETTING
def test_steps(mode, layout, num_tokens, bases, device, monkeypatch):
    base, exact_base = bases
    before = {name: value.clone() for name, value in base.state_dict().items()}
    fields = dict(mode=mode, layout=layout, heads=1, channels=CHANNELS, seed=3)
    generator = torch.Generator().manual_seed(num_tokens)
    embeds = torch.randn(1, num_tokens, SHAPE.hidden, generator=generator).to(device, DTYPE)
    labels = torch.randint(SHAPE.vocab, (num_tokens,), generator=generator).to(device)

    calls = count_calls(monkeypatch)
    given = []  # the deltas before each step
    found = []
    steps = Steps(base, S2FTConfig(**fields), backend._eager)
    for block in blocks(steps.model):
        assert joined(block.mlp.gate_proj.weight, block.mlp.up_proj.weight) is not None
    optimizer = torch.optim.AdamW(steps.deltas().values(), lr=1e-3)
    for _ in range(STEPS):
        given.append({name: delta.detach().clone() for name, delta in steps.deltas().items()})
        losses, dx, grads = steps.step(embeds, labels)
        assert taken(calls) == SHAPE.layers
        found.append((losses, dx, {name: grad.clone() for name, grad in grads.items()}))
        optimizer.step()
    base = steps.model.unload()
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    others = []
    for model, choose in ((base, lambda: reference), (exact_base, lambda: reference)):
        other, results = Steps(model, S2FTConfig(fuse=False, **fields), choose), []
        for deltas in given:
            with torch.no_grad():
                for name, delta in other.deltas().items():
                    delta.copy_(deltas[name])
            losses, dx, grads = other.step(embeds, labels)
            results.append((losses, dx, {name: grad.clone() for name, grad in grads.items()}))
        other.model.unload()
        others.append(results)
    assert taken(calls) == 0
    for actual, eager, exact in zip(found, *others, strict=True):
        assert_as_accurate(actual[0], exact[0], eager[0])
        assert_as_accurate(actual[1], exact[1], eager[1])
        assert actual[2].keys() == exact[2].keys() and len(actual[2]) == 2 * SHAPE.layers
        for name in exact[2]:
            assert_as_accurate(actual[2][name], exact[2][name], eager[2][name])
