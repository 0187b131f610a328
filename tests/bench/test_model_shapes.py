"""Shapes: exact counts without a model, and models that can be trained on."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.steps.model_shapes import TABLE

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "tinyllama-1.1b": 1_100_048_384,
}
TOY = TABLE["toy"]
TOYS = [
    TOY,
    replace(TOY, model_type="qwen2", heads=6, kv_heads=3, head_dim=8),
    replace(TOY, model_type="qwen3", heads=3, kv_heads=1, head_dim=24, tied=True),
]


@pytest.mark.parametrize("name", TABLE)
def test_parameters_are_those_of_the_model(name):
    shape = TABLE[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(128))
    assert shape.parameters() == PUBLISHED.get(name, shape.parameters())
    linears = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert [tuple(weight.shape) for weight in linears[:7]] == list(shape.linears().values())


@pytest.mark.parametrize("shape", TOYS, ids=lambda shape: shape.model_type)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_built_model_has_the_parameters_and_a_sane_loss(shape, dtype):
    model = shape.build(33, dtype, "cpu", seed=3)
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == shape.parameters()
    assert {p.dtype for p in parameters} == {dtype}
    assert not any(p.requires_grad for p in parameters)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == shape.tied

    batch = torch.randint(shape.vocab, (2, 33), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    assert abs(float(loss) - torch.tensor(shape.vocab).log().item()) < 0.5


def test_a_built_model_computes_what_the_class_of_transformers_does():
    # Most of all its rotary frequencies, which no initialisation of ours makes.
    model = TOY.build(16, torch.float32, "cpu")
    reference = AutoModelForCausalLM.from_config(TOY.config(16), attn_implementation="sdpa")
    reference.load_state_dict(model.state_dict())
    batch = torch.arange(32).view(2, 16)
    expected = reference(input_ids=batch, use_cache=False).logits
    torch.testing.assert_close(model(input_ids=batch, use_cache=False).logits, expected)


def test_weights_depend_on_the_seed_alone():
    first, again, other = (TOY.build(8, torch.float32, "cpu", seed=seed) for seed in (1, 1, 2))
    query = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(first.state_dict()[query], again.state_dict()[query])
    assert not torch.equal(first.state_dict()[query], other.state_dict()[query])
    assert 0.015 < float(first.state_dict()[query].std()) < 0.025
    assert bool((first.model.norm.weight == 1).all())


def test_large_weights_repeat_what_was_drawn(monkeypatch):
    monkeypatch.setattr("bench.steps.model_shapes.DRAWN", 1009)
    weight = TOY.build(8, torch.float32, "cpu").model.layers[0].mlp.up_proj.weight
    flat = weight.flatten()
    assert torch.equal(flat[1009:], flat[:-1009]) and 0.015 < float(flat.std()) < 0.025
    assert len(weight.unique(dim=0)) == len(weight)  # and yet no two rows are equal


def test_a_cut_model_is_the_same_with_fewer_layers():
    whole = TABLE["llama-2-7b"]
    cut = whole.cut(3)
    assert (cut.name, cut.layers, cut.of_layers) == (whole.name, 3, 32)
    removed = 29 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)  # linears and norms
    assert cut.parameters() == whole.parameters() - removed
    fewer = whole.cut(3, vocab=1000)
    assert (fewer.vocab, fewer.of_vocab) == (1000, 32000) == (1000, cut.vocab)
    assert fewer.parameters() == cut.parameters() - 2 * 31000 * whole.hidden
    again = fewer.cut(5)  # a cut goes by the whole model
    assert (again.layers, again.vocab) == (5, 32000)
