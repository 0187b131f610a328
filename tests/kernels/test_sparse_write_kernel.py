"""Writing the trained entries of every layer in one launch, against plain torch, bit for bit."""

import importlib

import numpy as np
import pytest
import torch
from layouts import LAYOUTS, contiguous, transposed

from s2kernels import kernels, reference

module = importlib.import_module("s2kernels.kernels.sparse_write")

INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# (N, K, k): more than one block of entries; odd; all of few; one of everything.
SHAPES = [(64, 128, 2100), (67, 131, 65), (5, 3, 15), (1, 1, 1)]


def _layers(dtype, device, layout=contiguous, index_dtype=torch.int32, shapes=SHAPES):
    """weights, base, delta and index of sparse_write."""
    layers = []
    for N, K, k in shapes:
        weight = layout(torch.randn(N, K, device=device).to(dtype))
        index = torch.randperm(N * K)[:k].sort().values.to(device, index_dtype)
        base = torch.randn(k, device=device).to(dtype)
        layers.append((weight, base, torch.randn(k, device=device), index))
    return tuple(list(column) for column in zip(*layers, strict=True))


def _bits(x):
    return x.contiguous().view(INTEGERS[x.dtype])


def _check(weights, base, delta, index):
    expected = [weight.clone() for weight in weights]
    versions = [weight._version for weight in weights]
    reference.sparse_write(expected, base, delta, index)
    kernels.sparse_write(weights, base, delta, index)
    # Entries that are not in the index are compared as well.
    for weight, one in zip(weights, expected, strict=True):
        assert _bits(weight).equal(_bits(one))
    assert [weight._version for weight in weights] == versions


@pytest.fixture
def launches(grids_of):
    return grids_of(module, "_sparse_write_kernel")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_sparse_write(index_dtype, dtype, device, launches):
    _check(*_layers(dtype, device, index_dtype=index_dtype))
    assert len(launches) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    weights, base, delta, index = _layers(dtype, device, layout)
    _check(weights, [torch.stack([b, b], 1)[:, 0] for b in base], delta, index)


def test_layers_of_other_layouts_share_the_launch(dtype, device, launches):
    pairs = zip(_layers(dtype, device), _layers(dtype, device, transposed), strict=True)
    _check(*(first + second for first, second in pairs))
    assert len(launches) == 1


@pytest.mark.parametrize("dtype", INTEGERS)
def test_write_and_restore_bit_for_bit(dtype, device, launches):
    """Every bit pattern, NaN payloads and negative zeros among them, survives."""
    weights, _, delta, index = _layers(dtype, device)
    integer = INTEGERS[dtype]
    limits = torch.iinfo(integer)
    for weight in weights:
        random = torch.randint(limits.min, limits.max, weight.shape, dtype=integer, device=device)
        weight.copy_(random.view(dtype))
    before = [weight.clone() for weight in weights]
    base = [w.view(-1)[i.long()].clone() for w, i in zip(weights, index, strict=True)]
    kernels.sparse_write(weights, base, delta, index)
    assert not any(_bits(w).equal(_bits(b)) for w, b in zip(weights[:2], before, strict=False))
    kernels.sparse_write(weights, base, None, index)
    assert all(_bits(w).equal(_bits(b)) for w, b in zip(weights, before, strict=True))
    assert len(launches) == 2


def test_one_launch_for_each_combination_of_dtypes(device, launches):
    halves, floats = _layers(torch.float16, device), _layers(torch.float32, device)
    weights, base, delta, index = (h + f for h, f in zip(halves, floats, strict=True))
    delta[1] = delta[1].half()
    _check(weights, base, delta, index)
    assert len(launches) == 3


def test_sum_is_rounded_once(device):
    """1 + 2⁻¹¹ + 2⁻²² in fp16: a delta rounded first is 2⁻¹¹, a tie, and the sum then 1."""
    weight = torch.zeros(1, 1, dtype=torch.float16, device=device)
    base = torch.ones(1, dtype=torch.float16, device=device)
    delta = torch.full((1,), 2**-11 + 2**-22, device=device)
    index = torch.zeros(1, dtype=torch.int32, device=device)
    kernels.sparse_write([weight], [base], [delta], [index])
    assert weight.item() == 1 + 2**-10


def test_same_tensors_reuse_the_table(device):
    args = _layers(torch.float32, device)
    kernels.sparse_write(*args)
    before = module._table.cache_info()
    args[2][0].add_(1.0)
    _check(*args)
    after = module._table.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


@pytest.mark.slow
def test_every_layer_of_a_large_model_has_a_table(device):
    """All of them by a forward, and one by one by the checkpoints that a backward recomputes."""
    columns = _layers(torch.float32, device, shapes=[(2, 3, 4)] * 7 * 32)
    layers = [[[value] for value in layer] for layer in zip(*columns, strict=True)]

    def step():
        kernels.sparse_write(*columns)
        for layer in layers:
            kernels.sparse_write(*layer)

    step()
    before = module._table.cache_info()
    step()
    after = module._table.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1 + 7 * 32, before.misses)


def test_offsets_beyond_32_bits(device):
    """Three rows, 2³⁰ elements apart; on CPU only the pages in use exist."""
    size = 2 * 2**30 + 9
    if device.type == "cuda":
        memory = torch.zeros(size, dtype=torch.float16, device=device)
    else:
        memory = torch.from_numpy(np.zeros(size, dtype=np.float16))
    weight = memory.as_strided((3, 9), (2**30, 1)).copy_(torch.randn(3, 9))
    _, base, delta, index = _layers(torch.float16, device, shapes=[(3, 9, 20)])
    _check([weight], base, delta, index)


def test_nothing_to_write(launches):
    kernels.sparse_write([], [], [], [])
    assert launches == []
