"""What holds of s2_linear and sparse_linear alike: values, gradients, memory and settings."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from trained_layers import (
    COUNTS,
    INDICES,
    SliceLayer,
    SparseLayer,
    assert_as_accurate_as_dense,
    assert_close,
)

SLICES = {
    f"{dim}-{mode}-{name}": partial(SliceLayer, dim, mode, index)
    for dim in ("in", "out")
    for mode in ("inplace", "additive")
    for name, index in INDICES.items()
}
ENTRIES = {
    f"entries-{mode}-{name}": partial(SparseLayer, mode, num)
    for mode in ("inplace", "additive", "panels")
    for name, num in COUNTS.items()
}
ALL = SLICES | ENTRIES
KINDS = {name: make for name, make in ALL.items() if not name.endswith(("one", "all"))}
INPLACE = {name: make for name, make in KINDS.items() if "inplace" in name}
# Of a weight of 33 x 50: other places.
WIDE = {
    f"{dim}-{mode}": [
        partial(SliceLayer, dim, mode, index)
        for index in (slice(3, 17), torch.tensor([31, 2, 16, 5], dtype=torch.int32))
    ]
    for dim in ("in", "out")
    for mode in ("inplace", "additive")
} | {
    f"entries-{mode}": [partial(SparseLayer, mode, num) for num in (1, 200, 33 * 50)]
    for mode in ("inplace", "additive", "panels")
}

kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_gradcheck(make):
    layer = make()
    inputs = (layer.x, layer.delta, layer.bias)
    assert torch.autograd.gradcheck(lambda x, d, b: layer(x, d, b), inputs)


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("tokens", [(37,), (2, 9), (1,), (0,), (4, 0)])
@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(layers, id=name, marks=[pytest.mark.slow] if "entries" in name else [])
        for name, layers in WIDE.items()
    ],
)
def test_equal_to_dense_autograd_where_it_trains(layers, tokens, impl, device, dtypes):
    for dtype in dtypes:
        for make in layers:
            layer = make(tokens=tokens, dtype=dtype, device=device, n=33, k=50)
            assert_as_accurate_as_dense(layer, impl)


@kinds
def test_strided_inputs(make):
    layer = make(tokens=(6, 4))
    exact = layer.dense()
    wide = torch.zeros(6, 8, 7, dtype=torch.float64)
    wide[:, ::2] = layer.x.detach()
    layer.x = wide[:, ::2].requires_grad_()
    layer.weight = layer.weight.t().contiguous().t()
    layer.dy = layer.dy.transpose(0, 1).contiguous().transpose(0, 1)
    y = layer()
    y.backward(layer.dy)
    assert_close((y, *layer.gradients()), exact)


@pytest.mark.parametrize("tokens", [(), (5,), (3, 5), (2, 0)], ids=str)
@kinds
def test_what_comes_out_may_be_written_to(make, tokens):
    """As with torch's own layer, which has a bias, too."""
    layer = make(tokens=tokens)
    exact = layer.dense()
    y = layer()
    y.mul_(2)
    y.backward(layer.dy / 2)
    assert_close((y / 2, *layer.gradients()), exact)


@kinds
def test_what_is_written(make):
    """In place what is trained and nothing else, exactly; otherwise nothing."""
    layer = make(dtype=torch.float32)
    version = layer.weight._version
    layer().sum().backward()
    assert layer.weight._version == version
    if layer.base is not None:
        others = torch.ones_like(layer.weight, dtype=torch.bool)
        others[layer.where] = False
        assert layer.weight[others].equal(layer.original[others])
        assert layer.weight[layer.where].equal(layer.base + layer.delta.detach())
        layer.restore()
    assert layer.weight.equal(layer.original)


@kinds
def test_what_needs_no_gradient_is_neither_saved_nor_computed(make):
    layer = make()
    exact = layer.dense()
    layer.delta.requires_grad_(False)
    assert layer.kept().saved == 0
    layer().backward(layer.dy)
    assert layer.delta.grad is None
    assert_close([layer.x.grad], exact[1:2])

    layer.delta.requires_grad_()
    layer.x = layer.x.detach()
    layer().backward(layer.dy)
    assert layer.x.grad is None
    assert_close([layer.delta.grad], exact[2:3])


@kinds
def test_gradients_accumulate_over_micro_batches_and_uses(make):
    layer = make(tokens=(6, 4))
    exact = layer.dense()
    ys = [layer(layer.x[part]) for part in (slice(0, 1), slice(1, 4))]
    layer(layer.x[4:]).backward(layer.dy[4:])
    torch.autograd.backward(ys, [layer.dy[:1], layer.dy[1:4]])
    assert_close(layer.gradients(), exact[1:])


@pytest.mark.parametrize("use_reentrant", (True, False))
@kinds
def test_checkpointing_trains(make, use_reentrant):
    layer = make()
    exact = layer.dense()
    checkpoint(layer, layer.x, use_reentrant=use_reentrant).backward(layer.dy)
    assert_close(layer.gradients(), exact[1:])


@kinds
def test_autocast_computes_in_its_dtype_and_returns_fp32_gradients(make, device):
    layer = make(tokens=(4, 6), dtype=torch.float32, device=device)
    exact = layer.dense(torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(impl="torch")
    assert y.dtype == torch.bfloat16
    y.backward(layer.dy.bfloat16())
    assert {grad.dtype for grad in layer.gradients()} == {torch.float32}
    for got, want in zip((y, *layer.gradients()), exact, strict=True):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 4 * torch.finfo(torch.bfloat16).eps, error


@pytest.mark.parametrize("make", INPLACE.values(), ids=INPLACE)
def test_two_deltas_take_turns_in_one_weight(make):
    first, second = make(), make()
    second.weight = first.weight
    with torch.no_grad():
        second.delta.mul_(-3)
    wanted = first.dense(), second.dense()
    ys = [layer.held() for layer in (first, second)]
    for layer, y, exact in zip((first, second), ys, wanted, strict=True):
        y.backward(layer.dy)
        assert_close((y, *layer.gradients()), exact)


@kinds
def test_a_delta_that_changed_before_backward_is_noticed(make):
    layer = make()
    y = layer()
    with torch.no_grad():
        layer.delta.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(layer.dy)
