"""Weights that lie one after the other in memory."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.measure.memory import storages
from s2kernels.autograd.joined import is_alone, join_, joined


def frozen(*shape, dtype=torch.float64, device="cpu"):
    return nn.Parameter(torch.randn(*shape, dtype=dtype, device=device), requires_grad=False)


def test_joined_weights_stay_the_parameters_they_were():
    first, second, third = frozen(5, 3), frozen(2, 3), frozen(4, 3)
    values = torch.cat([first, second, third]).clone()
    assert joined(first, second) is None
    old = weakref.ref(second.untyped_storage())
    parameters = [id(p) for p in (first, second, third)]
    join_(first, second, third)
    assert [id(p) for p in (first, second, third)] == parameters
    assert old() is None or len(storages([first, second, third])) == 1
    assert torch.equal(joined(first, second, third), values)
    assert torch.equal(joined(second, third), values[5:])
    assert joined(second, first) is None and joined(first, third) is None

    # what is written into one of them is in the whole, and the other way round
    version = second._version
    second.copy_(second.flip(0))
    assert torch.equal(joined(first, second)[5:], values[5:7].flip(0))
    assert second._version > version
    whole = joined(first, second)
    join_(first, second)
    assert joined(first, second).data_ptr() == whole.data_ptr()


def test_joining_takes_no_lasting_memory():
    weights = [frozen(64, 8) for _ in range(3)]
    before = sum(storages(weights).values())
    join_(*weights)
    assert sum(storages(weights).values()) == before


@pytest.mark.parametrize("change", ("to", "data"))
def test_weights_that_were_moved_are_not_joined(change):
    weights = frozen(4, 3), frozen(2, 3)
    join_(*weights)
    module = nn.ParameterList(weights)
    if change == "to":
        module.to(torch.float32)
    else:
        weights[1].data = weights[1].data.clone()
    assert joined(*module) is None
    values = torch.cat(list(module))
    module[0].data = module[0].data.clone()  # out of the storage that was shared
    join_(*module)
    assert torch.equal(joined(*module), values)


def test_neighbours_in_other_storages_and_gaps_are_not_joined():
    whole = torch.randn(7, 3)
    assert joined(whole[:4], whole[4:]) is not None
    assert joined(whole[:4], whole[5:]) is None
    assert joined(whole[:, :2], whole[:, :2]) is None
    assert joined(whole[:4], whole.clone()[4:]) is None
    assert joined(whole[:4], whole[4:].to(torch.float64)) is None
    assert joined(torch.empty(4, 3, device="meta"), torch.empty(4, 3, device="meta")) is None


def test_saved_for_backward_before_and_used_after():
    """As when a module that was moved is joined anew: autograd meets the same values."""
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weights = frozen(4, 6), frozen(2, 6)
    loss = sum(F.linear(x, weight).square().sum() for weight in weights)
    (want,) = torch.autograd.grad(loss, x, retain_graph=True)
    with torch.inference_mode():
        join_(*weights)
    loss.backward()
    assert torch.equal(x.grad, want)
    assert not weights[0].is_inference()


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([frozen(4, 3), torch.zeros(2, 3)], TypeError, "plain floating Parameters, got a Tensor"),
        (
            [frozen(4, 3), nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), False)],
            TypeError,
            "got a Parameter of torch.int8",
        ),
        ([frozen(4, 3), frozen(2, 3, dtype=torch.float32)], TypeError, "share a dtype"),
        ([frozen(4, 3), frozen(2, 4)], ValueError, "one in_features"),
        ([frozen(4), frozen(2)], ValueError, "matrices"),
        ([frozen(4, 3), frozen(2, 3, device="meta")], ValueError, "not meta"),
    ],
)
def test_join_refuses(weights, error, message):
    places = [weight.data_ptr() for weight in weights if not weight.is_meta]
    with pytest.raises(error, match=message):
        join_(*weights)
    assert [weight.data_ptr() for weight in weights if not weight.is_meta] == places


def test_join_refuses_what_shares_its_storage():
    whole = torch.randn(6, 3)
    part, other = nn.Parameter(whole[:4], requires_grad=False), frozen(2, 3, dtype=torch.float32)
    assert not is_alone(part) and is_alone(other)
    with pytest.raises(ValueError, match="a storage each"):
        join_(part, other)
