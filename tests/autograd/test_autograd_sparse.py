"""sparse_linear, beside what test_autograd_layers.py says of it."""

import weakref
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from trained_layers import COUNTS, assert_as_accurate_as_dense, assert_close
from trained_layers import SparseLayer as Layer

from s2kernels.autograd import panels, sparse_linear
from s2kernels.autograd.panels import Panels
from s2kernels.plan import tile_plan

MODES = ("inplace", "additive", "panels")
IMPLS = ("torch", "triton")


@pytest.mark.parametrize("num", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("mode", MODES[1:])
def test_several_panels_gradcheck(mode, num, monkeypatch):
    """Of three rows, three rows and one; some have no entries."""
    monkeypatch.setattr(panels, "WORKSPACE", 3 * 7)
    layer = Layer(mode, num)
    inputs = (layer.x, layer.delta, layer.bias)
    assert torch.autograd.gradcheck(lambda x, d, b: layer(x, d, b), inputs)
    assert_close([layer()], layer.dense()[:1])
    assert layer.calls % 3 == 0


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES[1:])
def test_several_panels_are_as_accurate_as_one_gemm(mode, impl, device, dtypes, monkeypatch):
    """In half precision, too, where a sum over 25 panels must not be rounded after each of them."""
    monkeypatch.setattr(panels, "WORKSPACE", 8 * 50)
    for dtype in dtypes:
        layer = Layer(mode, 300, (21,), dtype, device, n=200, k=50)
        assert_as_accurate_as_dense(layer, impl)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_dx_is_summed_over_panels_without_rounding(dtype, monkeypatch):
    """Against one GEMM, in the mean over all entries of dx: 100 panels cost half as much again."""
    errors = []
    for workspace in (400 * 30, 4 * 30):
        monkeypatch.setattr(panels, "WORKSPACE", workspace)
        layer = Layer("panels", 9, (64,), dtype, n=400, k=30)
        layer(impl="torch").backward(layer.dy)
        exact = layer.dense(torch.float64)[1]
        errors.append(float((layer.x.grad.double() - exact).square().mean().sqrt()))
    assert len(panels.bounds((400, 30))) == 101
    assert errors[1] < 1.6 * errors[0]


@pytest.mark.parametrize(
    ("shape", "step"),
    [((11008, 4096), 1), ((4096, 11008), 1), ((999, 33333), 64), ((70000, 77), 64), ((5, 2**23), 1)]
    + [((4096, 4096), 4096), ((300, 2**20), 7), ((1, 1), 1), ((2048, 2048), 3), ((2049, 2048), 3)],
)
def test_bounds_of_panels(shape, step):
    """All rows, once; steps kept; no more than the workspace, and no panel that is much smaller."""
    found = panels.bounds(shape, step)
    assert found[0] == 0 and found[-1] == shape[0]
    sizes = [stop - start for start, stop in pairwise(found)]
    assert min(sizes) > 0 and all(start % step == 0 for start in found[:-1])
    assert max(sizes) * shape[1] <= panels.WORKSPACE or max(sizes) <= step
    if step * shape[1] * 8 <= panels.WORKSPACE:
        wanted = shape[0] * shape[1] / panels.WORKSPACE
        assert len(sizes) <= 1.2 * wanted + 1


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_one_panel_is_in_memory_at_a_time(dtype, monkeypatch):
    """Used up before the next one is made, and nothing of them is kept for the backward."""
    monkeypatch.setattr(panels, "WORKSPACE", 2 * 7)
    layer, made = Layer("panels", 9, dtype=torch.float32), []

    def rows(start, stop):
        assert not any(panel() is not None for panel in made)
        new = layer.original[start:stop].clone()
        made.append(weakref.ref(new))
        return new

    x = layer.x.detach().to(dtype).requires_grad_()
    weight = Panels((7, 7), rows)
    y = sparse_linear(x, weight, layer.delta, layer.index, mode="additive", impl="torch")
    assert len(made) == 4 and not any(panel() is not None for panel in made)
    y.sum().backward()
    assert len(made) == 8 and not any(panel() is not None for panel in made)


def test_a_new_selection_moves_entries_between_panels(monkeypatch):
    """Where an index is written to, the entries of each panel are found anew."""
    monkeypatch.setattr(panels, "WORKSPACE", 2 * 7)
    layer = Layer("panels", 9)
    layer()
    layer.index.copy_(torch.arange(40, 49))
    layer.plan = tile_plan(layer.index, (7, 7))
    y = layer()
    y.backward(layer.dy)
    assert_close((y, *layer.gradients()), layer.dense())


@pytest.mark.parametrize("mode", MODES)
def test_saves_its_input_and_nothing_else(mode):
    kept = Layer(mode, 9, (4, 8), torch.float32).kept()
    assert (kept.saved, kept.unseen) == (32 * 7 * 4, 0)


@pytest.mark.parametrize("needs_dx", (False, True))
def test_rows_are_made_again_only_for_dx(needs_dx):
    layer = Layer("panels", 9)
    layer.x.requires_grad_(needs_dx)
    layer().backward(layer.dy)
    assert layer.calls == 1 + needs_dx


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_trains_and_observes_once(mode, use_reentrant):
    layer, seen = Layer(mode, 9), []
    exact = layer.dense()
    y = checkpoint(
        lambda x: layer(x, observe=lambda *args: seen.append(args)),
        layer.x,
        use_reentrant=use_reentrant,
    )
    y.backward(layer.dy)
    assert_close(layer.gradients(), exact[1:])
    ((dy, x),) = seen
    assert dy.equal(layer.dy.view(-1, 7)) and x.equal(layer.x.detach().view(-1, 7))


@pytest.mark.parametrize("mode", MODES)
def test_observer_sees_a_layer_whose_delta_is_frozen(mode):
    layer, seen = Layer(mode, 9), []
    layer.delta.requires_grad_(False)
    layer(observe=lambda dy, x: seen.append(dy.t() @ x)).backward(layer.dy)
    torch.testing.assert_close(seen[0], layer.dy.view(-1, 7).t() @ layer.x.detach().view(-1, 7))


@pytest.mark.parametrize("mode", ("inplace", "additive"))
def test_autocast_takes_an_input_that_is_in_its_dtype(mode, device):
    """What another layer has computed; the same as the fp32 numbers, bit for bit."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        layer = Layer(mode, 9, (4, 6), torch.float32, device)
        layer.x = layer.x.detach().bfloat16().to(dtype).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            y = layer(impl="torch")
        y.backward(layer.dy.bfloat16())
        assert layer.x.grad.dtype == dtype
        results.append([y, *(grad.float() for grad in layer.gradients())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_modes_agree_bit_for_bit_under_autocast():
    """The sum of weight and delta is rounded to the dtype of autocast once, in every mode."""
    with torch.autocast("cpu", torch.bfloat16):
        ys = [Layer(mode, 49, (4, 6), torch.float32)(impl="torch") for mode in MODES]
    assert ys[1].equal(ys[0]) and ys[2].equal(ys[0])


@pytest.mark.parametrize("mode", MODES)
def test_an_index_that_changed_before_backward_is_noticed(mode):
    layer = Layer(mode, 9)
    y = layer()
    layer.index.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(layer.dy)


def _refused():
    layer = Layer("inplace", 3, dtype=torch.float32)
    index = torch.tensor([4, 5, 48], dtype=torch.int32)
    good = dict(x=layer.x, weight=layer.weight, delta=layer.delta, index=index)
    meta = torch.device("meta")
    other_plan = tile_plan(index, (7, 8))
    panelled = Panels((7, 7), layer.rows)
    cases = {
        "index out of range": (dict(index=index + 1), ValueError, "index must lie in"),
        "index negative": (dict(index=index - 5), ValueError, "index must lie in"),
        "index repeated": (dict(index=index.new_tensor([1, 1, 2])), ValueError, "1 repeated"),
        "index unsorted": (dict(index=index.new_tensor([2, 1, 3])), ValueError, "must ascend"),
        "index strided": (
            dict(index=index.repeat_interleave(2)[::2]),
            ValueError,
            "index must be contiguous",
        ),
        "index empty": (dict(index=index[:0]), ValueError, "non-empty"),
        "index int64": (dict(index=index.long()), TypeError, "torch.int32"),
        "index list": (dict(index=[1, 2, 3]), TypeError, "index must be a tensor"),
        "index of two dimensions": (dict(index=index[None]), ValueError, "one dimension"),
        "index elsewhere": (dict(index=index.to(meta)), ValueError, "index must be on"),
        "mode": (dict(mode="fast"), ValueError, "mode must be one of"),
        "impl": (dict(impl="cuda"), ValueError, "impl must be"),
        "delta too short": (dict(delta=layer.delta[:2]), ValueError, "delta must have shape"),
        "delta integer": (dict(delta=torch.zeros(3, dtype=torch.int32)), TypeError, "delta must"),
        "weight integer": (dict(weight=layer.weight.to(torch.int8)), TypeError, "weight must be"),
        "panels in place": (dict(weight=panelled), TypeError, "weight must be"),
        "x too narrow for panels": (
            dict(weight=panelled, mode="additive", x=layer.x[..., :6]),
            ValueError,
            "x must have shape",
        ),
        "panels of another shape": (
            dict(weight=Panels((7, 7), lambda *_: layer.weight[:6]), mode="additive"),
            ValueError,
            r"weight.rows\(0, 7\) must have shape \(7, 7\), got \(6, 7\)",
        ),
        "integer panels": (
            dict(weight=Panels((7, 7), lambda *_: layer.weight.int()), mode="additive"),
            TypeError,
            "weight.rows must give a floating dtype",
        ),
        "weight of no kind": (
            dict(weight=None, mode="additive"),
            TypeError,
            "weight must be",
        ),
        "weight trained": (
            dict(weight=layer.weight.clone().requires_grad_()),
            ValueError,
            "frozen",
        ),
        "x too narrow": (dict(x=layer.x[..., :6]), ValueError, "x must have shape"),
        "bias of another shape": (dict(bias=layer.bias[:6]), ValueError, "bias must have shape"),
        "plan of another weight": (dict(plan=other_plan), ValueError, "plan must be of"),
    }
    return good, cases


GOOD, REFUSED = _refused()


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(case):
    change, error, message = REFUSED[case]
    arguments = GOOD | change
    weight = GOOD["weight"].clone()
    with pytest.raises(error, match=message):
        sparse_linear(**arguments)
    assert torch.equal(GOOD["weight"], weight)


def test_index_is_looked_at_again_after_it_changed():
    layer = Layer("additive", 3, dtype=torch.float32)
    layer()
    layer.index[0] = layer.index[1]
    with pytest.raises(ValueError, match="1 repeated"):
        layer()
