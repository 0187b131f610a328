"""Every kernel against plain torch over drawn shapes, strides, index sets and dtypes."""

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, make_index
from numerics import DTYPES, assert_as_accurate

from s2kernels import kernels, reference

EXAMPLES = settings(max_examples=30)
SIZES = st.integers(1, 70)


@st.composite
def problems(draw):
    """Sizes, a slice and a function that makes an operand, all from one seed."""
    M, N, K = draw(st.integers(0, 70)), draw(SIZES), draw(SIZES)
    dim = draw(st.sampled_from(["in", "out"]))
    R = draw(st.integers(1, K if dim == "in" else N))
    dtype = draw(st.sampled_from(DTYPES))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(draw(st.integers(0, 2**16)))
    index = make_index(draw(st.sampled_from(["run", "any"])), K if dim == "in" else N, R, device)

    def operand(*shape, dtype=dtype):
        layout = draw(st.sampled_from(LAYOUTS))
        return layout(torch.randn(shape, device=device).to(dtype))

    return M, N, K, R, dim, index, operand


def _double(args):
    return [
        arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in args
    ]


def _check(op, *args):
    eager_args = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    exact = getattr(reference, op)(*_double(args))
    eager = getattr(reference, op)(*eager_args)
    assert_as_accurate(getattr(kernels, op)(*args), exact, eager)


@EXAMPLES
@given(problems())
def test_linear(problem):
    M, N, K, *_, operand = problem
    _check("linear", operand(M, K), operand(N, K), operand(1, N)[0])
    _check("linear_dx", operand(M, N), operand(N, K))


@EXAMPLES
@given(problems(), st.sampled_from([None, torch.float32, torch.float16]))
def test_slice_grad(problem, out_dtype):
    M, N, K, R, dim, index, operand = problem
    shape = (N, R) if dim == "in" else (R, K)
    out = None if out_dtype is None else operand(*shape, dtype=out_dtype)
    _check("slice_grad", operand(M, N), operand(M, K), index, dim, out)


@EXAMPLES
@given(problems(), st.lists(st.integers(0, 70), max_size=4), st.sampled_from(DTYPES))
def test_slice_grad_each(problem, ends, out_dtype):
    M, N, K, R, dim, index, operand = problem
    dy, x = operand(M, N), operand(M, K)
    ends = sorted([M, *(min(end, M) for end in ends)])
    offsets = torch.tensor(ends, dtype=torch.int32, device=x.device)
    if isinstance(index, torch.Tensor):
        index = torch.stack([index.roll(expert) for expert in range(len(offsets))])
    shape = (N, R) if dim == "in" else (R, K)
    out = torch.stack([operand(*shape, dtype=out_dtype) for _ in offsets])
    _check("slice_grad_each", dy, x, offsets, index, dim, out)


@pytest.mark.slow
@EXAMPLES
@given(problems())
def test_swiglu_bwd(problem):
    M, N, K, _, dim, index, operand = problem
    shape = (M, K) if dim == "in" else (M, N)
    dh, gate, up = operand(*shape), operand(*shape), operand(*shape)
    exact = reference.swiglu_bwd(dh.double(), gate.double(), up.double(), index)
    eager = reference.swiglu_bwd(dh, gate, up, index)
    for results in zip(kernels.swiglu_bwd(dh, gate, up, index), exact, eager, strict=True):
        assert_as_accurate(*results)
    _check("swiglu", gate, up)


@pytest.mark.parametrize("op", ["slice_linear_", "slice_linear_dx_"])
@EXAMPLES
@given(problem=problems())
def test_slice_linear(op, problem):
    M, N, K, R, dim, index, operand = problem
    delta = operand(*((N, R) if dim == "in" else (R, K)), dtype=torch.float32)
    result, other = operand(M, N), operand(M, K)
    if op == "slice_linear_dx_":
        result, other = other, result
    _check(op, result, other, delta, index, dim)


@EXAMPLES
@given(st.lists(problems(), min_size=1, max_size=4), st.data())
def test_slice_write(problems, data):
    weights, bases, deltas, indices, dims = [], [], [], [], []
    for _, N, K, R, dim, index, operand in problems:
        shape = (N, R) if dim == "in" else (R, K)
        weights.append(operand(N, K))
        bases.append(operand(*shape))
        deltas.append(operand(*shape, dtype=torch.float32) if data.draw(st.booleans()) else None)
        indices.append(index)
        dims.append(dim)
    expected = [weight.clone() for weight in weights]
    reference.slice_write(expected, bases, deltas, indices, dims)
    kernels.slice_write(weights, bases, deltas, indices, dims)
    assert all(weight.equal(one) for weight, one in zip(weights, expected, strict=True))
