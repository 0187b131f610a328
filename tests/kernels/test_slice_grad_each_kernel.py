"""The gradients of all experts' slices in one launch, in Triton against plain torch."""

import pytest
import torch
from layouts import LAYOUTS, contiguous, make_index
from numerics import assert_as_accurate

from s2kernels import kernels, reference

# (N, K, R): aligned, with as many channels as a narrow and a wide tile; odd in every dimension and
# past one tile; one of everything.
SIZES = [(128, 128, 32), (128, 256, 128), (137, 131, 67), (1, 1, 1)]
# Pairs of each expert: the first, one in the middle and the last without any; all but one; none; a
# single expert; several blocks of pairs, the last one of which is full for the second expert only.
COUNTS = [(0, 5, 33, 0, 1, 0), (0, 0, 40, 0), (0, 0, 0), (37,), (150, 128)]


def _operands(counts, sizes, dim, kind, dtype, device, layout=contiguous):
    """dy, x, offsets, index, for which `kind` of index."""
    S, (N, K, R) = sum(counts), sizes
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32).to(device)
    index = None
    if kind == "compact":
        N, K = (N, R) if dim == "in" else (R, K)
    else:
        size = K if dim == "in" else N
        index = make_index(kind, size, R, device)
        if kind == "any":
            index = torch.stack([make_index(kind, size, R, device) for _ in counts])
    dy = layout(torch.randn(S, N, device=device).to(dtype))
    x = layout(torch.randn(S, K, device=device).to(dtype))
    return dy, x, offsets, index


def _gradients(counts, sizes, dim, device, dtype=torch.float32):
    N, K, R = sizes
    shape = (N, R) if dim == "in" else (R, K)
    return torch.randn(len(counts), *shape, device=device).to(dtype)


def _check(dy, x, offsets, index, dim, out):
    before = out.clone()
    double = (dy.double(), x.double(), offsets, index, dim, out.double())
    exact = reference.slice_grad_each(*double)
    eager = reference.slice_grad_each(dy, x, offsets, index, dim, out.clone())
    assert kernels.slice_grad_each(dy, x, offsets, index, dim, out) is out
    assert_as_accurate(out, exact, eager)
    pairs = offsets.diff(prepend=offsets.new_zeros(1))
    assert out[pairs == 0].equal(before[pairs == 0])
    assert (out[pairs > 0] != before[pairs > 0]).any() or not pairs.any()


@pytest.mark.parametrize("sizes", SIZES)
def test_slice_grad_each(sizes, dim, kind, dtype, device):
    counts = COUNTS[0]
    operands = _operands(counts, sizes, dim, kind, dtype, device)
    _check(*operands, dim, _gradients(counts, sizes, dim, device))


@pytest.mark.parametrize("counts", COUNTS[1:])
def test_pairs_of_each_expert(counts, dim, kind, dtype, device):
    operands = _operands(counts, (19, 23, 7), dim, kind, dtype, device)
    _check(*operands, dim, _gradients(counts, (19, 23, 7), dim, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dim, kind, dtype, device):
    counts = (20, 0, 17)
    operands = _operands(counts, (45, 51, 9), dim, kind, dtype, device, layout)
    _check(*operands, dim, _gradients(counts, (45, 51, 9), dim, device))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adds_into_gradients_of_any_dtype(out_dtype, dim, dtype, device):
    counts = (20, 0, 17)
    operands = _operands(counts, (35, 33, 9), dim, "any", dtype, device)
    _check(*operands, dim, _gradients(counts, (35, 33, 9), dim, device, out_dtype))


def test_adds_into_part_of_a_buffer(dim, device):
    """Gradients may be views of one buffer: what lies between them stays."""
    counts, sizes = (20, 0, 17), (12, 12, 4)
    operands = _operands(counts, sizes, dim, "any", torch.float32, device)
    buffer = torch.zeros(7, 16, 16, device=device)
    part = buffer[1:7:2, 2:14, 5:9] if dim == "in" else buffer[1:7:2, 5:9, 2:14]
    part.copy_(_gradients(counts, sizes, dim, device))
    _check(*operands, dim, part)
    part.zero_()
    assert not buffer.any()


def test_bit_equal_when_run_twice(dim, dtype, device):
    counts = (90, 0, 33)
    operands = _operands(counts, (45, 51, 9), dim, "any", dtype, device)
    start = _gradients(counts, (45, 51, 9), dim, device)
    first = kernels.slice_grad_each(*operands, dim, start.clone())
    assert kernels.slice_grad_each(*operands, dim, start.clone()).equal(first)


def test_fp64_is_refused(dim):
    operands = _operands((3, 2), (4, 5, 2), dim, "any", torch.float64, "cpu")
    with pytest.raises(ValueError, match="float64: use impl='torch'"):
        kernels.slice_grad_each(*operands, dim, _gradients((3, 2), (4, 5, 2), dim, "cpu"))
