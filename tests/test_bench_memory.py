"""Peaks and counts: they must see what allocator and dispatcher do, to the byte and the call."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import counts, memory

# Multiples of the blocks that the caching allocator of CUDA hands out.
M, K = 512, 1024
BYTES = M * K * 4


@pytest.fixture
def held() -> dict[str, torch.Tensor]:
    """Where actions put what is to outlive them."""
    return {}


def test_peaks_count_temporaries_and_what_is_kept(device, held):
    def build():
        held["x"] = torch.randn(M, K, device=device)

    def two_temporaries():
        held["y"] = held["x"].exp().neg()  # both results at once, then the last alone

    def release():
        held.clear()

    def nothing():
        pass

    found = memory.peaks([build, two_temporaries, nothing, release, nothing], device)
    assert found == [BYTES, 3 * BYTES, 2 * BYTES, 2 * BYTES, 0]


def test_peaks_see_temporaries_inside_an_operator(device, held):
    """The backward of a transposed layer norm: its input is copied where nothing else sees it."""
    held["x"] = torch.randn(K, M, device=device)
    (found,) = memory.peaks([lambda: F.layer_norm(held["x"].t(), (K,))], device)
    assert 2 * BYTES <= found < 2.1 * BYTES  # the copy and the result


def test_peaks_leave_out_what_was_there_before(device, held):
    held["x"] = torch.randn(M, K, device=device)

    def replace():
        held.clear()
        held["y"] = torch.empty(M // 2, K, device=device)

    expected = BYTES // 2
    if device.type == "cuda":  # where the allocator's total is read, x leaves it
        expected = 0
    assert memory.peaks([replace], device) == [expected]


def test_peaks_of_one_call_are_not_those_of_another(device, held):
    """Blocks of an earlier call, given back later, must not be taken for those of this one."""
    for _ in range(3):
        memory.peaks([lambda: held.update(x=torch.empty(M, K, device=device))], device)
        held.clear()
        assert memory.peaks([lambda: torch.empty(M, K, device=device)], device) == [BYTES]


def test_peak_of_a_training_step_is_its_parts(device):
    """Full fine-tuning of few tokens: at the optimizer's step four numbers for each weight."""
    made = {}

    def build():
        made["model"] = nn.Sequential(*(nn.Linear(K, K, bias=False) for _ in range(4))).to(device)
        made["optimizer"] = torch.optim.AdamW(made["model"].parameters(), fused=True)

    def step():
        made["optimizer"].zero_grad()
        made["model"](torch.ones(1, K, device=device)).sum().backward()
        made["optimizer"].step()

    _, first, *steady = memory.peaks([build, step, step, step], device)
    weights = 4 * K * K * 4
    assert 4 * weights <= first <= min(steady)
    if device.type == "cpu":  # on CUDA the workspaces of cuBLAS come on top
        assert max(steady) < 4 * weights + 64 * 1024 + 8 * K * 4


def test_peaks_of_backward_in_another_thread(device):
    """What the backward allocates counts, whichever thread the engine runs it in."""
    x = torch.randn(M, K, device=device, requires_grad=True)
    y = x.exp()
    (found,) = memory.peaks([lambda: y.sum().backward()], device)
    assert BYTES <= found < 3.1 * BYTES
    assert x.grad is not None


@pytest.mark.parametrize(
    "windows, reports, expected",
    [
        ([(0, 9)], [], [0]),
        ([(0, 9)], [(1, 0xA, 5), (2, 0xB, 7), (3, 0xA, -5)], [12]),
        ([(0, 9)], [(1, 0xA, -5), (2, 0xB, 7)], [7]),  # older than the first report
        ([(0, 9)], [(1, 0xA, 5), (2, 0xA, -5), (3, 0xA, 8)], [8]),  # the same address again
        ([(0, 4), (6, 9)], [(1, 0xA, 5), (5, 0xA, -5)], [5, 0]),  # given back between two
        ([(0, 4), (6, 9)], [(5, 0xA, 5), (7, 0xB, 3)], [0, 8]),  # taken between two
        ([(2, 4), (6, 9)], [(1, 0xA, 5), (3, 0xA, -5)], [5, 0]),  # alive when a window opens
    ],
)
def test_peaks_within(windows, reports, expected):
    assert memory._peaks_within(windows, reports) == expected


def test_sparse_tensors_are_their_indices_and_values():
    indices, values = torch.tensor([[0, 2], [1, 0]]), torch.tensor([1.0, 2.0])
    sparse = torch.sparse_coo_tensor(indices, values, (3, 3), check_invariants=True)
    assert memory.total_bytes([sparse]) == 4 * 8 + 2 * 4
    x = torch.randn(3, 3, requires_grad=True)
    kept = memory.kept_by(lambda: ((x + 1) * (x.detach() + sparse)).sum(), nn.Module())
    assert kept == memory.Kept(saved=9 * 4, unseen=0)


def test_operators_are_counted_in_both_directions(device):
    x = torch.randn(4, 4, device=device)
    assert counts.operators(lambda: None) == 0
    assert counts.operators(lambda: x + 1) == 1
    assert counts.operators(lambda: x @ x.t()) == 2
    y = x.clone().requires_grad_(True)
    loss = (y * 2).sum()
    assert counts.operators(loss.backward) >= 3  # ones, expand, mul
    assert y.grad is not None


def test_launches_are_those_of_kernels(device):
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaMemcpyAsync"]
    assert counts.launches_among([*names, "Optimizer.step#AdamW.step", "aten::add"]) == 3
    x = torch.randn(4, 4, device=device)
    found = counts.launches(lambda: x + 1, device)
    assert found is None or (device.type == "cuda" and found == 1)
