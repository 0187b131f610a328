"""Dense products with what follows them in one launch, against plain torch in several."""

import pytest
import torch
from layouts import contiguous, make_index, some_columns
from numerics import assert_as_accurate

from s2kernels import reference
from s2kernels.kernels import fused_linear, target

# (M, N, K, R): aligned, which descriptors serve, in more than one tile; odd sizes, which they
# cannot; one token, and one of everything; no tokens.
SHAPES = [(136, 264, 280, 72), (37, 141, 77, 9), (1, 24, 16, 8), (1, 1, 1, 1), (0, 24, 16, 8)]


def plus_slice(x, weight, bias, x_slice, delta):
    return reference.slice_linear_(reference.linear(x, weight, bias), x_slice, delta, None, "in")


def dx_plus_slice(dy, weight, dy_slice, delta):
    return reference.linear_dx(dy, weight).addmm_(dy_slice, delta.to(dy.dtype))


def dx_swiglu_bwd(dy, weight, gate, up, index):
    return reference.swiglu_bwd(reference.linear_dx(dy, weight), gate, up, index)


def _check(op, expected, *args):
    double = [
        arg.double() if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in args
    ]
    results = getattr(fused_linear, op)(*args), expected(*double), expected(*args)
    if torch.is_tensor(results[0]):
        results = tuple((result,) for result in results)
    for actual, exact, eager in zip(*results, strict=True):
        if exact is None:
            assert actual is None
        else:
            assert_as_accurate(actual, exact, eager)


@pytest.fixture
def randn(device):
    def make(*shape, dtype, layout=contiguous):
        return layout(torch.randn(shape, device=device).to(dtype))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("delta_dtype", [torch.float32, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_plus_slice(shape, delta_dtype, dtype, randn):
    M, N, K, R = shape
    x, weight, x_slice = (randn(*size, dtype=dtype) for size in ((M, K), (N, K), (M, R)))
    delta = randn(N, R, dtype=delta_dtype or dtype)
    if delta_dtype is not None:
        delta = delta.to(dtype).float()  # the cast is no error of the kernel's
    for bias in (None, randn(2 * N, dtype=dtype)[::2]):
        if bias is None:
            _check(
                "linear_plus_slice",
                lambda x, w, _, *part: plus_slice(x, w, None, *part),
                *(x, weight, bias, x_slice, delta),
            )
        else:
            _check("linear_plus_slice", plus_slice, x, weight, bias, x_slice, delta)


@pytest.mark.parametrize("layout", [contiguous, some_columns])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_dx_plus_slice(shape, layout, dtype, randn):
    M, N, K, R = shape
    dy, weight = randn(M, N, dtype=dtype, layout=layout), randn(N, K, dtype=dtype, layout=layout)
    part = randn(M, R, dtype=dtype, layout=layout), randn(R, K, dtype=dtype, layout=layout)
    _check("linear_dx_plus_slice", dx_plus_slice, dy, weight, *part)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "any", None])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_dx_swiglu_bwd(shape, kind, dtype, device, randn):
    M, N, K, R = shape
    dy, weight = randn(M, N, dtype=dtype), randn(N, K, dtype=dtype) / N**0.5
    gate, up = randn(M, K, dtype=dtype), randn(M, K, dtype=dtype)
    index = None if kind is None else make_index(kind, K, R, device)
    _check("linear_dx_swiglu_bwd", dx_swiglu_bwd, dy, weight, gate, up, index)


def test_gates_that_are_a_view(dtype, device, randn):
    """gate and up as halves of one (M, 2 K), as one GEMM for both would leave them."""
    M, N, K = 24, 32, 48
    gate, up = randn(M, 2 * K, dtype=dtype).split(K, dim=1)
    dy, weight = randn(M, N, dtype=dtype), randn(N, K, dtype=dtype)
    _check("linear_dx_swiglu_bwd", dx_swiglu_bwd, dy, weight, gate, up, slice(8, 24))


@pytest.mark.parametrize("kind", ["run", "any"])
def test_gradients_over_gate_and_up(kind, dtype, device, randn):
    M, N, K = 24, 32, 48
    gate_up = randn(M, 2 * K, dtype=dtype)
    dy, weight = randn(M, N, dtype=dtype), randn(N, K, dtype=dtype)
    index = make_index(kind, K, 16, device)
    want = fused_linear.linear_dx_swiglu_bwd(dy, weight, *gate_up.chunk(2, 1), index)
    halves = gate_up.chunk(2, 1)
    *_, h_slice = fused_linear.linear_dx_swiglu_bwd(dy, weight, *halves, index, out=halves)
    assert torch.equal(gate_up, torch.cat(want[:2], 1))
    assert torch.equal(h_slice, want[2])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_descriptors_where_they_serve(monkeypatch, arch, device):
    if device.type == "cuda":
        pytest.skip("asks about a chip that is not this one")
    monkeypatch.setattr(target, "WITHOUT_GPU", target.Chip("none", arch, 4))
    x = torch.zeros(16, 16, dtype=torch.float16)
    assert target.takes_descriptors(x) == (arch == "sm_90")
    refused = [x.float(), x.t(), x[:, 1:9], x[:0], x[:1].expand(4, 16), torch.zeros(4, 7).half()]
    assert not any(target.takes_descriptors(x, other) for other in refused)
