"""Mixed batches after their first forward: a grouped op a layer, equal to an adapter at a time."""

import pytest
import torch
from peft import get_peft_model
from s2ft_models import WIDE, config, deltas, randomized
from tiny_models import tiny_model, token_ids

from s2kernels import reference

NAMES = ["second", "default", "__base__", "second", "third"]


@pytest.fixture(params=["llama", "gpt2", "opt", "phi3"])
def model(request):
    """Three adapters, of other sizes, one of which trains fewer layers than the others."""
    model = get_peft_model(tiny_model(request.param, **WIDE), config()).eval()
    model.add_adapter("second", config(heads=3, channels=20, seed=9))
    model.add_adapter("third", config(heads=1, channels=9, seed=4, layers_to_transform=[0]))
    return randomized(model)


@pytest.fixture
def calls(monkeypatch):
    """How often the grouped ops were called."""
    counts = []
    for name in ("grouped_in_", "grouped_out_"):
        op = getattr(reference, name)

        def counted(*args, op=op, name=name):
            counts.append(name)
            return op(*args)

        monkeypatch.setattr(reference, name, counted)
    return counts


def twice(model, **inputs):
    """The logits of the first and the second forward of one batch."""
    with model._enable_peft_forward_hooks(adapter_names=NAMES):
        return model.base_model(**inputs).logits, model.base_model(**inputs).logits


@pytest.mark.parametrize("length", [1, 6, 11])  # sums of rows, and a product for each adapter
@torch.no_grad()
def test_the_second_forward_equals_the_first(model, calls, length):
    first, second = twice(model, input_ids=token_ids(batch=5, length=length))
    assert calls and (first - second).abs().max() < 1e-12
    model.set_adapter("second")
    alone = model(input_ids=token_ids(batch=5, length=length)).logits
    assert (second[0] - alone[0]).abs().max() < 1e-12
    assert (second[1] - alone[1]).abs().max() > 1e-3


@torch.no_grad()
def test_generate_takes_the_grouped_ops_and_gives_what_each_adapter_gives(model, calls):
    ids = token_ids(batch=5)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    together = model.generate(input_ids=ids, adapter_names=NAMES, **options)
    assert calls
    for row in (0, 1, 3, 4):
        model.set_adapter(NAMES[row])
        assert torch.equal(
            together[row], model.generate(input_ids=ids[row : row + 1], **options)[0]
        )


@torch.no_grad()
def test_what_changes_between_two_calls_is_seen(model):
    ids = token_ids(batch=5)
    _, before = twice(model, input_ids=ids)
    for delta in deltas(model).values():
        delta.data.mul_(-1)
    _, after = twice(model, input_ids=ids)
    first, _ = twice(model, input_ids=ids)
    assert (before - after).abs().max() > 1e-3
    assert (first - after).abs().max() < 1e-12


def test_gradients_flow_in_every_forward(model, calls):
    embeds = model.get_input_embeddings()(token_ids(batch=5)).detach().requires_grad_()
    for delta in deltas(model).values():
        delta.requires_grad_()
    first, second = twice(model, inputs_embeds=embeds)
    inputs = [embeds, *deltas(model).values()]
    weights = torch.randn_like(first)
    wanted = torch.autograd.grad((first * weights).sum(), inputs)
    got = torch.autograd.grad((second * weights).sum(), inputs)
    assert not calls
    for a, b in zip(wanted, got, strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0


@torch.no_grad()
def test_half_precision_and_frozen_adapters(calls):
    """Deltas in fp32 beside a base in bf16: cast as one by one; sums are of another order."""
    model = get_peft_model(tiny_model("llama", torch.bfloat16, **WIDE), config()).eval()
    model.add_adapter("second", config(heads=3, channels=20, seed=9))
    model.add_adapter("third", config(heads=1, channels=9, seed=4, layers_to_transform=[0]))
    randomized(model).requires_grad_(False)
    first, second = twice(model, input_ids=token_ids(batch=5, length=3))
    assert calls
    assert (first - second).float().norm() < 0.02 * first.float().norm()
