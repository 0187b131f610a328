"""The gradient of a slice in Triton against plain torch."""

import importlib

import pytest
import torch
from layouts import LAYOUTS, contiguous, slice_operands, transposed
from numerics import assert_as_accurate

from s2kernels import kernels, reference
from s2kernels.kernels import target, tuned

# Not the attribute of the package: that is the launcher of the same name.
module = importlib.import_module("s2kernels.kernels.slice_grad")

# (M, N, K, R): aligned, with as many channels as a narrow and a wide tile; odd in every dimension
# and past one tile; one of everything; no tokens.
SHAPES = [(64, 128, 128, 32), (64, 128, 256, 128), (45, 137, 131, 67), (1, 1, 1, 1), (0, 9, 7, 3)]


@pytest.fixture
def split(monkeypatch):
    """Make any few tokens worth a program of their own; returns the splits that were launched."""
    launched = []
    choose = module._split

    def spy(*args):
        launched.append(choose(*args)[0])
        return choose(*args)

    monkeypatch.setattr(module, "MIN_TOKENS_PER_SPLIT", 16)
    monkeypatch.setattr(module, "_split", spy)
    return launched


def _check(dy, x, index, dim, out=None):
    exact = reference.slice_grad(
        dy.double(), x.double(), index, dim, None if out is None else out.double()
    )
    eager = reference.slice_grad(dy, x, index, dim, None if out is None else out.clone())
    actual = kernels.slice_grad(dy, x, index, dim, out)
    assert out is None or actual is out
    assert_as_accurate(actual, exact, eager)


@pytest.mark.parametrize("shape", SHAPES)
def test_slice_grad(shape, dim, kind, dtype, device):
    _check(*slice_operands(shape, dim, kind, dtype, device), dim)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dim, kind, dtype, device):
    _check(*slice_operands((37, 45, 51, 9), dim, kind, dtype, device, layout), dim)


@pytest.mark.parametrize("num_tokens", [100, 300])
def test_split_over_tokens(split, num_tokens, dim, kind, dtype, device):
    _check(*slice_operands((num_tokens, 45, 51, 9), dim, kind, dtype, device), dim)
    assert split[0] > 1


@pytest.mark.parametrize("layout", [contiguous, transposed])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_tokens", [0, 30, 200])
def test_adds_into_out(split, num_tokens, out_dtype, layout, dim, dtype, device):
    dy, x, index = slice_operands((num_tokens, 35, 33, 9), dim, "any", dtype, device)
    shape = (35, 9) if dim == "in" else (9, 33)
    _check(dy, x, index, dim, layout(torch.randn(shape, device=device).to(out_dtype)))
    assert (split[0] > 1) == (num_tokens == 200)


def test_adds_into_part_of_a_buffer(split, dim, device):
    """Gradients may be views of one buffer: what lies between them stays."""
    dy, x, index = slice_operands((100, 12, 12, 4), dim, "any", torch.float32, device)
    buffer = torch.zeros(16, 16, device=device)
    where = (slice(2, 14), slice(5, 9)) if dim == "in" else (slice(5, 9), slice(2, 14))
    kernels.slice_grad(dy, x, index, dim, buffer[where])
    assert buffer[where].all()
    buffer[where] = 0
    assert not buffer.any()


def test_bit_equal_when_run_twice(split, dim, dtype, device):
    dy, x, index = slice_operands((300, 45, 51, 9), dim, "any", dtype, device)
    first = kernels.slice_grad(dy, x, index, dim)
    assert split[0] > 1
    assert all(kernels.slice_grad(dy, x, index, dim).equal(first) for _ in range(2))


@pytest.mark.parametrize("tiles", [1, 7, 64, 132, 5000])
@pytest.mark.parametrize("num_tokens", [0, 1, 255, 512, 5000, 8192])
def test_split_covers_the_tokens_once(num_tokens, tiles):
    chosen = module._choose_splits(num_tokens, tiles, programs=132)
    splits, tokens = module._split(num_tokens, chosen, block=64)
    assert tokens % 64 == 0
    assert splits * tokens >= num_tokens > (splits - 1) * tokens or num_tokens == 0
    assert splits == 1 or (splits * tiles <= 132 and tokens >= module.MIN_TOKENS_PER_SPLIT)


def test_measured_launch_is_used(monkeypatch, split, dim, dtype, device):
    """An entry of the table serves its sizes, and fewer tokens than it was measured with."""
    launch = dict(module.launch_parameters(module.LAUNCH, dtype), SPLITS=3, BLOCK_M=16)
    key = (target.chip(device).arch, "slice_grad", target._dtype_key(dtype))
    monkeypatch.setitem(tuned.LAUNCH, key, {(45 if dim == "in" else 51, 9): {128: launch}})
    _check(*slice_operands((96, 45, 51, 9), dim, "any", dtype, device), dim)
    _check(*slice_operands((20, 45, 51, 9), dim, "any", dtype, device), dim)
    assert split == [3, 2]


def test_the_next_larger_measured_number_of_channels_counts(monkeypatch, device):
    key = (target.chip(device).arch, "slice_grad", "half")
    table = {(64, r): {512: {"BLOCK_P": r}, 4096: {}} for r in (128, 192)}
    monkeypatch.setitem(tuned.LAUNCH, key, table | {(32, 64): {512: {"BLOCK_P": 1}}})
    x, default = torch.empty(0, dtype=torch.bfloat16, device=device), {"BLOCK_P": 0}

    def found(P, R, tokens=512):
        return target.tuned_parameters("slice_grad", x, (P, R), tokens, default)["BLOCK_P"]

    assert [found(64, r) for r in (1, 128, 129, 192, 500)] == [128, 128, 192, 192, 192]
    assert (found(64, 129, 4000), found(48, 64), found(32, 8)) == (0, 0, 1)
