"""Adapters written into the weights of a served model, and taken out without a trace."""

import random

import numpy as np
import pytest
import torch
from model_states import assert_same
from served_models import DIMS, llama, random_slices, state, with_slices
from tiny_models import tiny_model

from s2kernels import kernels, reference
from s2kernels.adapter import Slice
from s2kernels.serve import switch as switching
from s2kernels.serve.switch import Switcher
from s2kernels.serve.words import Words


def expected(model, slices):
    """What the weights hold then: base + delta, rounded once."""
    values = state(model)
    for name, part in slices.items():
        weight = values[f"{name}.weight"]
        held = weight.index_select(part.axis, part.index.long())
        weight.index_copy_(part.axis, part.index.long(), (held + part.delta).to(weight.dtype))
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("run", [False, True])
def test_switching_is_exact(dtype, run):
    model = llama(dtype)
    base, switcher = state(model), Switcher(model)
    adapters = {seed: random_slices(model, seed, list(DIMS), run=run) for seed in range(5)}
    want = {seed: expected(model, slices) for seed, slices in adapters.items()}
    order = [0, 1, 1, 2, None, 3, 0, 4, 1, 0, None]
    for key in order:
        switcher.switch(key, None if key is None else adapters[key])
        assert switcher.active == key
        assert_same(model.state_dict(), base if key is None else want[key])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_by_the_op_that_a_gpu_takes(impl, monkeypatch):
    """All slices in one launch, in the interpreter here."""
    monkeypatch.setattr(switching, "_is_on_cpu", lambda weight: False)
    monkeypatch.setattr(switching.backend, "select", lambda x: ops)
    model = llama(torch.float16)
    ops = {"torch": reference, "triton": kernels}[impl]
    base, switcher = state(model), Switcher(model)
    adapters = {seed: random_slices(model, seed, list(DIMS)) for seed in range(2)}
    want = {seed: expected(model, slices) for seed, slices in adapters.items()}
    for key in (0, 1, 0, None):
        switcher.switch(key, None if key is None else adapters[key])
        assert_same(model.state_dict(), base if key is None else want[key])


def test_the_base_is_read_through_what_is_written():
    model = llama()
    base, switcher = state(model), Switcher(model)
    one, other = random_slices(model, 1, most=30), random_slices(model, 2, most=30)
    switcher.switch("one", one)
    for name, part in other.items():
        weight = base[f"{name}.weight"]
        got = switcher.base_slice(name, part.index, part.dim)
        assert torch.equal(got, weight.index_select(part.axis, part.index.long()))
        axis = 1 - part.axis  # across it
        index = torch.randperm(weight.shape[axis])[:5].int()
        got = switcher.base_slice(name, index, "in" if axis else "out")
        assert torch.equal(got, weight.index_select(axis, index.long()))


def test_one_adapter_trains_the_inputs_and_another_the_outputs_of_a_layer():
    model = llama()
    base, switcher = state(model), Switcher(model)
    name = "model.layers.0.self_attn.o_proj"
    first = {name: Slice("in", torch.tensor([3, 1], dtype=torch.int32), torch.randn(32, 2))}
    second = {name: Slice("out", torch.tensor([1, 7], dtype=torch.int32), torch.randn(2, 32))}
    want = [expected(model, slices) for slices in (first, second)]
    switcher.switch("first", first)
    assert_same(model.state_dict(), want[0])
    switcher.switch("second", second)
    assert_same(model.state_dict(), want[1])
    switcher.switch(None, None)
    assert_same(model.state_dict(), base)


def test_gpt2_keeps_its_weights_the_other_way_round():
    model = tiny_model("gpt2", torch.float32)
    base, switcher = state(model), Switcher(model)
    name = "transformer.h.0.mlp.c_proj"
    index, delta = torch.tensor([39, 0, 2], dtype=torch.int32), torch.randn(32, 3)
    switcher.switch("a", {name: Slice("in", index, delta)})
    want = base[f"{name}.weight"].clone()
    want[index.long()] += delta.t()
    assert torch.equal(model.get_submodule(name).weight, want)
    switcher.switch(None, None)
    assert_same(model.state_dict(), base)


@pytest.mark.parametrize("tied", [False, True])
def test_layers_of_one_weight(tied):
    """Two layers with the same weight, of which one adapter trains channels of either axis.

    Not tied, each new adapter meets the channels of the one before it along the same axis.
    """
    model = torch.nn.Sequential(*(torch.nn.Linear(12, 12, bias=False) for _ in range(2)))
    if tied:
        model[1].weight = model[0].weight
    base, switcher = state(model), Switcher(model)
    index = torch.tensor([3, 1, 4], dtype=torch.int32)
    adapters = [
        {
            "0": Slice("in", index + number, torch.randn(12, 3)),
            "1": Slice("out", index + 2 * number, torch.randn(3, 12)),
        }
        for number in range(3)
    ]
    for key in (0, 1, 2, 1, 1, None, 2, 0):
        switcher.switch(key, None if key is None else adapters[key])
        want = {name: value.clone() for name, value in base.items()}
        for name, part in ({} if key is None else adapters[key]).items():
            # A tied weight has the sums of both with the base; where they meet, the last one wins.
            weight, held = want[f"{name}.weight"], base[f"{name}.weight"]
            value = held.index_select(part.axis, part.index) + part.delta
            for each in want.values() if tied else [weight]:
                each.index_copy_(part.axis, part.index.long(), value)
        assert_same(state(model), want)
    switcher.switch(None, None)
    assert_same(state(model), base)


def test_the_version_of_a_weight_stays():
    model = llama()
    switcher, slices = Switcher(model), random_slices(model, 1, list(DIMS))
    versions = [parameter._version for parameter in model.parameters()]
    for key in ("a", None, "a"):
        switcher.switch(key, None if key is None else slices)
    assert [parameter._version for parameter in model.parameters()] == versions


@pytest.mark.slow
def test_a_thousand_switches_with_exceptions_leave_no_trace(monkeypatch):
    """An exception out of any write, at any time: the base is there, and the next switch works."""
    model = llama(torch.bfloat16)
    base, switcher = state(model), Switcher(model)
    adapters = {seed: random_slices(model, seed, list(DIMS)) for seed in range(6)}
    want = {seed: expected(model, slices) for seed, slices in adapters.items()}
    draw, write, fuse = random.Random(0), Words.write_block, [-1]

    def failing(words, first, restore):
        fuse[0] -= 1
        if fuse[0] == 0:
            if draw.random() < 0.5:  # half done
                places = np.arange(len(words._memory))[words._where][::2]
                words._memory[places] = np.zeros((), words._memory.dtype)
            else:
                write(words, first, restore)
            raise draw.choice([MemoryError, KeyboardInterrupt, ValueError])("injected")
        write(words, first, restore)

    monkeypatch.setattr(Words, "write_block", failing)
    monkeypatch.setattr("s2kernels.serve.words._ROWS", 5)  # so that there are several blocks
    failures = 0
    for number in range(1000):
        key = draw.choice([None, *adapters])
        fuse[0] = draw.randrange(1, 160) if draw.random() < 0.3 else -1
        try:
            switcher.switch(key, None if key is None else adapters[key])
        except (MemoryError, KeyboardInterrupt, ValueError):
            failures += 1
            key = None
        fuse[0] = -1
        assert switcher.active == key
        if number % 50 == 0 or number > 990:
            assert_same(model.state_dict(), base if key is None else want[key])
    assert 50 < failures < 400
    switcher.switch(None, None)
    assert_same(model.state_dict(), base)


def test_weights_changed_in_between_are_seen():
    model = llama()
    switcher, slices = Switcher(model), random_slices(model, 1)
    switcher.switch("a", slices)
    switcher.switch(None, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    want = expected(model, slices)
    switcher.switch("a", slices)
    assert_same(model.state_dict(), want)


BAD = [
    ("no.such", lambda part: part, "no.such: the model has no such layer"),
    ("model.norm", lambda part: part, "model.norm is no linear layer"),
    (
        None,
        lambda part: Slice(part.dim, part.index + 2000, part.delta),
        r"index must lie in \[0, 32\).*, got 20",
    ),
    (None, lambda part: Slice("in", part.index, part.delta[:-1]), r"delta must have shape \(32, "),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_what_does_not_fit_changes_nothing(name, change, message):
    model = llama()
    base, switcher = state(model), Switcher(model)
    slices = random_slices(model, 1)
    last = "model.layers.1.self_attn.o_proj"
    slices[name or last] = change(slices[last])
    with pytest.raises(ValueError, match=message):
        switcher.switch("a", slices)
    assert switcher.active is None
    assert_same(model.state_dict(), base)


def test_logits_are_those_of_the_adapter():
    model = llama(torch.float64)
    switcher, slices = Switcher(model), random_slices(model, 1)
    slices = {n: Slice(p.dim, p.index, p.delta.double()) for n, p in slices.items()}
    want = with_slices(model, slices)(torch.arange(9)[None]).logits
    switcher.switch("a", slices)
    assert torch.equal(model(torch.arange(9)[None]).logits, want)
