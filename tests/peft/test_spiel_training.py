"""Both modes of SpIEL train the same, and a backward reads what its forward has read."""

import contextlib

import pytest
import torch
from spiel_models import EVERY_MODE, IDS, MODES, config, deltas, layers, randomized, train, wrapped
from tiny_models import tiny_model
from torch import nn

from s2kernels import backend, kernels, reference
from s2kernels.peft.spiel.model import random_entries


@pytest.mark.parametrize("selection", ("accumulated_gradient", "momentum_approximation"))
@pytest.mark.parametrize("checkpointing", (False, True))
def test_every_mode_follows_the_same_trajectory(selection, checkpointing):
    """Through several reselections."""
    results = []
    for mode in MODES:
        fields = dict(selection=selection, reselection_steps=5, accumulation_steps=2)
        model = wrapped(mode=mode, **fields).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses = train(model, steps=14, lr=1e-2 if selection[0] == "a" else 3e-2)
        results.append((losses, layers(model)))
        assert losses[-1] < 0.7 * losses[0]
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-9)
    for got, want in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(got.spiel_index["default"], want.spiel_index["default"])
        difference = (got.spiel_delta["default"] - want.spiel_delta["default"]).abs().max()
        assert difference < 1e-8


@EVERY_MODE
@pytest.mark.parametrize("ops", (None, kernels), ids=("backend", "triton"))
def test_gradients_are_those_of_dense_autograd_at_the_entries(mode, ops, monkeypatch):
    dtype = torch.float64 if ops is None else torch.float32
    model = randomized(wrapped(tiny_model("llama", dtype), mode=mode))
    if ops is not None:
        monkeypatch.setattr(backend, "select", lambda x, impl=None: ops)
    model(input_ids=IDS, labels=IDS).loss.backward()
    monkeypatch.setattr(backend, "select", lambda x, impl=None: reference)

    dense = tiny_model("llama", dtype).requires_grad_(True)
    for layer in layers(model):
        weight = dense.get_submodule(layer.name).weight
        with torch.no_grad():
            where = layer.spiel_index["default"].long()
            weight.view(-1)[where] += layer.spiel_delta["default"]
    dense(input_ids=IDS, labels=IDS).loss.backward()
    assert len(layers(model)) == 14
    for layer in layers(model):
        grad = dense.get_submodule(layer.name).weight.grad.flatten()
        want = grad[layer.spiel_index["default"].long()]
        assert want.abs().max() > 1e-8
        tolerance = dict(rtol=1e-10, atol=1e-12) if ops is None else dict(rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.spiel_delta["default"].grad, want, **tolerance)


@pytest.mark.parametrize("first", ("base", "additive", "inplace"))
def test_another_adapter_between_forward_and_backward_changes_no_gradient(first):
    """Its entries are in the weights by then; every backward reads what its forward has read."""
    model = randomized(wrapped(mode="inplace" if first == "base" else first))
    model.add_adapter("second", config(mode="inplace", num_tunable_weights=700, seed=9))
    randomized(model, "second", seed=6)

    def forward():
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        with model.disable_adapter() if first == "base" else contextlib.nullcontext():
            return x, model(inputs_embeds=x).logits.square().sum()

    x, loss = forward()
    loss.backward()
    later_x, loss = forward()
    model.set_adapter("second")
    model(IDS)
    loss.backward()
    torch.testing.assert_close(later_x.grad, x.grad, rtol=0, atol=1e-14 * float(x.grad.abs().max()))


@EVERY_MODE
@pytest.mark.parametrize("what", ("weight", "delta", "index", "adapter"))
def test_a_backward_reads_what_its_forward_read_or_is_refused(mode, what):
    """Other tensors are in the place of those by then, and have been written into the weight."""
    model = randomized(wrapped(mode=mode))
    model.add_adapter("second", config(mode=mode, num_tunable_weights=700, seed=9))
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def forward():
        return model(inputs_embeds=x).logits.square().sum()

    (want,) = torch.autograd.grad(forward(), x)
    loss = forward()
    layer = layers(model)[0]
    if what == "weight":
        fresh = torch.randn_like(layer.base_layer.weight)
        layer.base_layer.weight = nn.Parameter(fresh, requires_grad=False)
    elif what == "delta":
        layer.spiel_delta["default"] = nn.Parameter(layer.spiel_delta["default"].detach() + 1)
    elif what == "index":
        num = len(layer.spiel_index["default"])
        layer.spiel_index["default"] = random_entries(7, layer.name, layer.shape, num)
    else:
        model.delete_adapter("default")
    model(IDS)
    if mode == "inplace":
        with pytest.raises(RuntimeError, match="is another one than it was in the forward"):
            loss.backward()
    else:
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want, rtol=0, atol=1e-13)


def test_deltas_have_the_dtype_wanted():
    model = wrapped(
        tiny_model("llama", torch.bfloat16),
        delta_dtype="bfloat16",
        reselection_steps=3,
        accumulation_steps=1,
    ).train()
    assert {delta.dtype for delta in deltas(model)} == {torch.bfloat16}
    losses = train(model, steps=8)
    assert losses[-1] < losses[0] - 0.1
