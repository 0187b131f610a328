"""q, k and v by one Function: each output goes to the call that it is of, and to no other."""

import gc
import weakref

import pytest
import torch
from fused_models import adapted, assert_close, blocks, gradients, taken
from tiny_models import token_ids
from torch import nn

from bench.measure.memory import kept_by
from s2kernels.peft.s2ft.fused_qkv import Projection

pytestmark = pytest.mark.usefixtures("joined_as_on_a_gpu")


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
    waiting = [weakref.ref(out) for out in own.inputs._waiting.outputs.values()]
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
