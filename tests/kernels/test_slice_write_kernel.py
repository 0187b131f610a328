"""Writing every slice of a model in one launch, against plain torch, bit for bit."""

import importlib
import inspect

import pytest
import torch
from layouts import LAYOUTS, contiguous, every_other_column, make_index

from s2kernels import kernels, reference

module = importlib.import_module("s2kernels.kernels.slice_write")

INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# (N, K, R): aligned; odd and past one tile; one of everything.
SHAPES = [(64, 128, 32), (67, 131, 65), (1, 1, 1)]


def _slices(dtype, device, shapes=SHAPES, layout=contiguous, kinds=("run", "any")):
    """The arguments of slice_write for both dims and kinds of index at every shape."""
    weights, bases, deltas, indices, dims = [], [], [], [], []
    for N, K, R in shapes:
        for dim in ("in", "out"):
            for kind in kinds:
                slice_shape = (N, R) if dim == "in" else (R, K)
                weights.append(layout(torch.randn(N, K, device=device).to(dtype)))
                bases.append(layout(torch.randn(slice_shape, device=device).to(dtype)))
                deltas.append(layout(torch.randn(slice_shape, device=device)))
                indices.append(make_index(kind, K if dim == "in" else N, R, device))
                dims.append(dim)
    return weights, bases, deltas, indices, dims


def _bits(x):
    return x.contiguous().view(INTEGERS[x.dtype])


def _check(weights, *rest):
    expected = [weight.clone() for weight in weights]
    versions = [weight._version for weight in weights]
    reference.slice_write(expected, *rest)
    kernels.slice_write(weights, *rest)
    # Entries outside of the slices are compared as well.
    for weight, one in zip(weights, expected, strict=True):
        assert _bits(weight).equal(_bits(one))
    assert [weight._version for weight in weights] == versions


@pytest.fixture
def launches(grids_of):
    return grids_of(module, "_slice_write_kernel")


@pytest.fixture
def widths(device, monkeypatch):
    """For every tile whether it was written with wide accesses, in the order of the launch."""
    if device.type != "cpu":
        pytest.skip("compiled code is looked at in test_compile.py")
    found, write_tile = [], module._write_tile
    names = list(inspect.signature(write_tile.fn).parameters)
    # A wide tile is written at once, another one in four parts.
    num_rows = {launch["BLOCK_ROWS"] for launch in module.LAUNCH.values()}

    def spy(*args):
        part = dict(zip(names, args, strict=True))["offs_r"].shape[0].value
        found.append("wide" if part in num_rows else "part")
        return write_tile(*args)

    monkeypatch.setattr(module, "_write_tile", spy)
    return lambda: " ".join(found).replace("part part part part", "narrow").split()


@pytest.mark.parametrize("kinds", [("run",), ("any",), ("run", "any")])
def test_slice_write(kinds, dtype, device, launches):
    _check(*_slices(dtype, device, kinds=kinds))
    assert len(launches) == 1


@pytest.mark.parametrize("shape", [(37, 45, 9), (32, 48, 16)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, shape, dtype, device):
    _check(*_slices(dtype, device, [shape], layout))


def _one(dtype, device, shape=(70, 176), R=80, dim="in", layout=contiguous, delta=True):
    """Weight, base slice and delta of one slice."""
    N, K = shape
    slice_shape = (N, R) if dim == "in" else (R, K)
    weight, base = (layout(torch.randn(s, device=device).to(dtype)) for s in (shape, slice_shape))
    return weight, base, torch.randn(slice_shape, device=device) if delta else None


def _together(*slices):
    """Arguments of slice_write from (weight, base, delta, index, dim) of each slice."""
    return [list(column) for column in zip(*slices, strict=True)]


def _runs(firsts, length, device):
    within = torch.arange(length, dtype=torch.int32)
    return (torch.tensor(firsts, dtype=torch.int32)[:, None] + within).flatten().to(device)


def test_one_slice_does_not_narrow_the_others(dtype, device, launches, widths):
    """An index, odd strides and odd sizes of one slice leave the accesses of the others wide."""
    rows = torch.tensor([30, 3, 0, 21, 7], dtype=torch.int32, device=device)
    shape, R = (31, 128), 48  # one tile for columns, two for rows
    cases = {
        "a run": ("wide", slice(16, 64), {}),
        "a run that is not aligned": ("narrow", slice(3, 51), {}),
        "scattered columns": ("narrow", make_index("any", 128, R, device), {}),
        "aligned runs": ("wide", _runs([80, 0, 32], 16, device), {}),
        "not whole runs": ("narrow", slice(0, 47), dict(R=47)),
        "a run of rows": ("wide wide", slice(2, 7), dict(R=5, dim="out", delta=False)),
        "odd strides": ("narrow", slice(16, 64), dict(layout=every_other_column)),
        "any rows": ("wide wide", rows, dict(R=5, dim="out")),
        "odd rows": ("narrow narrow", rows, dict(shape=(31, 127), R=5, dim="out")),
    }
    slices = [
        (*_one(dtype, device, **dict(shape=shape, R=R) | fields), index, fields.get("dim", "in"))
        for _, index, fields in cases.values()
    ]
    _check(*_together(*slices))
    assert len(launches) == 1
    assert widths() == " ".join(want for want, *_ in cases.values()).split()


# Of 176 columns. Of the 80 in the index one tile has 64 and the next one the rest.
INDICES = {
    "aligned runs of 16": ([112, 0, 48, 160, 96], ["wide", "wide"]),
    "aligned runs of 8": ([168, 0, 48, 104, 96, 8, 16, 32, 72, 64], ["wide", "wide"]),
    "one of them is not aligned": (
        [168, 0, 49, 104, 96, 8, 16, 32, 72, 64],
        ["narrow", "wide"],
    ),
    "between the multiples of 8": (range(4, 164, 16), ["narrow", "narrow"]),
}


@pytest.mark.parametrize("delta", (True, False), ids=("write", "restore"))
@pytest.mark.parametrize("case", INDICES.values(), ids=INDICES)
def test_runs_within_an_index(case, delta, dtype, device, widths):
    firsts, want = case
    index = _runs(firsts, 80 // len(firsts), device)
    _check(*_together((*_one(dtype, device, delta=delta), index, "in")))
    assert widths() == 3 * want  # 70 rows are three tiles


@pytest.mark.parametrize("change", ("swapped", "reversed", "broken off", "only in one tile"))
def test_an_index_that_is_almost_one_of_runs(change, dtype, device, widths):
    index = _runs([0, 16, 48, 64, 96, 112, 128, 32, 80, 160], 8, "cpu")
    if change == "swapped":
        index[9], index[10] = index[10].clone(), index[9].clone()
    elif change == "reversed":
        index[16:24] = index[16:24].flip(0)
    elif change == "broken off":  # the run goes on elsewhere
        index[25:32] += 8
    else:
        index[64:] = torch.arange(159, 143, -1)
        index[:64] = torch.arange(64)
    assert index.unique().numel() == 80
    _check(*_together((*_one(dtype, device), index.to(device), "in")))
    want = ["narrow", "wide"] if change != "only in one tile" else ["wide", "narrow"]
    assert widths() == 3 * want


@pytest.mark.parametrize("shape", ((67, 176), (64, 175), (3, 8)))
def test_runs_at_odd_sizes(shape, dtype, device, widths):
    """Runs in rows that are not aligned themselves are not written as runs."""
    K = shape[1]
    index = _runs(range(0, K // 8 * 8, 16), 8, device)
    _check(*_together((*_one(dtype, device, shape, len(index)), index, "in")))
    assert set(widths()) == ({"narrow"} if K % 8 else {"wide"})


@pytest.mark.parametrize("dtype", INTEGERS)
def test_restores_bit_for_bit(dtype, device):
    """Every bit pattern, NaN payloads and negative zeros among them, survives."""
    weights, bases, _, indices, dims = _slices(dtype, device)
    integer = INTEGERS[dtype]
    limits = torch.iinfo(integer)
    bases = [
        torch.randint(limits.min, limits.max, base.shape, dtype=integer, device=device).view(dtype)
        for base in bases
    ]
    bases[0][0, :2] = torch.tensor([-0.0, float("nan")])
    deltas = [None] * len(bases)
    _check(weights, bases, deltas, indices, dims)
    assert _bits(weights[0][:, indices[0]]).equal(_bits(bases[0]))


def test_write_then_restore(dtype, device):
    weights, _, deltas, indices, dims = _slices(dtype, device)
    before = [weight.clone() for weight in weights]
    bases = [
        weight.index_select(axis, torch.arange(index.start, index.stop, device=device))
        if isinstance(index, slice)
        else weight.index_select(axis, index)
        for weight, index, axis in zip(
            weights, indices, [1 if dim == "in" else 0 for dim in dims], strict=True
        )
    ]
    kernels.slice_write(weights, bases, deltas, indices, dims)
    assert not any(w.equal(b) for w, b in zip(weights, before, strict=True))
    kernels.slice_write(weights, bases, [None] * len(bases), indices, dims)
    assert all(w.equal(b) for w, b in zip(weights, before, strict=True))


def test_some_slices_without_a_delta_share_the_launch(dtype, device, launches):
    weights, bases, deltas, indices, dims = _slices(dtype, device)
    deltas[1::2] = [None] * len(deltas[1::2])
    _check(weights, bases, deltas, indices, dims)
    assert len(launches) == 1


def test_one_launch_for_each_combination_of_dtypes(device, launches):
    halves, floats = _slices(torch.float16, device), _slices(torch.float32, device)
    weights, bases, deltas, indices, dims = (h + f for h, f in zip(halves, floats, strict=True))
    bases[0] = bases[0].float()
    deltas[1] = deltas[1].half()
    _check(weights, bases, deltas, indices, dims)
    assert len(launches) == 4


def test_sum_is_rounded_once(device):
    """1 + 2⁻¹¹ + 2⁻²² in fp16: a delta rounded first is 2⁻¹¹, a tie, and the sum then 1."""
    weight = torch.zeros(1, 1, dtype=torch.float16, device=device)
    base = torch.ones_like(weight)
    delta = torch.full((1, 1), 2**-11 + 2**-22, device=device)
    kernels.slice_write([weight], [base], [delta], [slice(0, 1)], ["in"])
    assert weight.item() == 1 + 2**-10


def test_same_tensors_reuse_the_table(device):
    args = _slices(torch.float32, device)
    kernels.slice_write(*args)
    before = module._table.cache_info()
    args[2][0].add_(1.0)
    _check(*args)
    after = module._table.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


@pytest.mark.parametrize("ops", [reference, kernels])
def test_a_writer_writes_what_its_tensors_hold_now(ops, dtype, device):
    weights, bases, deltas, indices, dims = _slices(dtype, device)
    write = ops.slice_writer(weights, bases, deltas, indices, dims)
    for _ in range(2):
        for tensor in (*weights, *bases, *deltas):
            tensor.normal_()
        expected = [weight.clone() for weight in weights]
        reference.slice_write(expected, bases, deltas, indices, dims)
        write()
        assert all(map(torch.equal, weights, expected))


def test_autograd_does_not_see_the_write(device):
    """A weight saved for backward stays usable."""
    weight = torch.randn(4, 4, device=device)
    x = torch.randn(3, 4, device=device, requires_grad=True)
    y = x @ weight.t()
    base = torch.ones(4, 2, device=device)
    kernels.slice_write([weight], [base], [torch.ones_like(base)], [slice(1, 3)], ["in"])
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 4))


def test_nothing_to_write(launches):
    kernels.slice_write([], [], [], [], [])
    assert launches == []
