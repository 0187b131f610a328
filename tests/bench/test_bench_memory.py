"""Bytes: what the allocator does, and what a forward keeps for its backward."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.measure import memory

# Multiples of the blocks that the caching allocator of CUDA hands out.
ROWS, WIDTH = 512, 1024
BYTES = ROWS * WIDTH * 4
M, K, N, R = 6, 10, 4, 3  # small ones
FP32 = 4


@pytest.fixture
def held() -> dict[str, torch.Tensor]:
    """Where actions put what is to outlive them."""
    return {}


def test_peaks_count_temporaries_and_what_is_kept(device, held):
    def build():
        held["x"] = torch.randn(ROWS, WIDTH, device=device)

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
    held["x"] = torch.randn(WIDTH, ROWS, device=device)
    (found,) = memory.peaks([lambda: F.layer_norm(held["x"].t(), (WIDTH,))], device)
    assert 2 * BYTES <= found < 2.1 * BYTES  # the copy and the result


def test_peaks_leave_out_what_was_there_before(device, held):
    held["x"] = torch.randn(ROWS, WIDTH, device=device)

    def replace():
        held.clear()
        held["y"] = torch.empty(ROWS // 2, WIDTH, device=device)

    expected = BYTES // 2
    if device.type == "cuda":  # where the allocator's total is read, x leaves it
        expected = 0
    assert memory.peaks([replace], device) == [expected]


def test_peaks_of_one_call_are_not_those_of_another(device, held):
    """Blocks of an earlier call, given back later, must not be taken for those of this one."""
    for _ in range(3):
        memory.peaks([lambda: held.update(x=torch.empty(ROWS, WIDTH, device=device))], device)
        held.clear()
        assert memory.peaks([lambda: torch.empty(ROWS, WIDTH, device=device)], device) == [BYTES]


def test_peak_of_a_training_step_is_its_parts(device):
    """Full fine-tuning of few tokens: at the optimizer's step four numbers for each weight."""
    made = {}

    def build():
        made["model"] = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))).to(
            device
        )
        made["optimizer"] = torch.optim.AdamW(made["model"].parameters(), fused=True)

    def step():
        made["optimizer"].zero_grad()
        made["model"](torch.ones(1, WIDTH, device=device)).sum().backward()
        made["optimizer"].step()

    _, first, *steady = memory.peaks([build, step, step, step], device)
    weights = 4 * WIDTH * WIDTH * 4
    assert 4 * weights <= first <= min(steady)
    if device.type == "cpu":  # on CUDA the workspaces of cuBLAS come on top
        assert max(steady) < 4 * weights + 64 * 1024 + 8 * WIDTH * 4


def test_peaks_of_backward_in_another_thread(device):
    """What the backward allocates counts, whichever thread the engine runs it in."""
    x = torch.randn(ROWS, WIDTH, device=device, requires_grad=True)
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


class Keeps(torch.autograd.Function):
    """The identity on x (M, K), which keeps something of x for its backward."""

    @staticmethod
    def forward(ctx, x, what):
        if what == "view":
            ctx.save_for_backward(x[:, :R])
        elif what == "copy":
            ctx.save_for_backward(x[:, :R].clone())
        elif what == "attribute":
            ctx.leak = x[:, :R].clone()
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, None


@pytest.mark.parametrize(
    "what, saved, unseen",
    [
        ("nothing", 0, 0),
        ("view", M * K * FP32, 0),
        ("copy", M * R * FP32, 0),
        ("attribute", 0, M * R * FP32),
    ],
)
def test_kept_by_sees_what_a_function_keeps(what, saved, unseen):
    start = torch.randn(M, K, requires_grad=True)
    kept = memory.kept_by(lambda: Keeps.apply(start + 1, what).sum(), nn.Module())
    assert kept == memory.Kept(saved, unseen)


def test_kept_by_sees_what_a_module_keeps():
    class Leaky(nn.Linear):
        def forward(self, x):
            self.last = x + 1
            return super().forward(x)

    model = Leaky(K, N).requires_grad_(False)
    x = torch.randn(M, K, requires_grad=True)
    assert memory.kept_by(lambda: model(x).sum(), model) == memory.Kept(0, M * K * FP32)


def test_kept_by_counts_storages_once_and_no_parameters():
    model = nn.Linear(K, N)
    x = torch.randn(M, K, requires_grad=True)

    def forward():
        h = x * 2  # saved by both layers and, as a view, by the product
        return (model(h) + model(h)).sum() + (h[:, :R] * h[:, -R:]).sum()

    assert memory.kept_by(forward, model) == memory.Kept(M * K * FP32, 0)
    model.requires_grad_(False)
    assert memory.kept_by(lambda: model(x * 2).sum(), model) == memory.Kept(0, 0)


def test_kept_by_leaves_out_what_the_graph_dropped():
    x = torch.randn(M, K, requires_grad=True)

    def forward():
        (x.exp() * x).sum()  # a branch that the loss does not hold
        return x.sum()

    assert memory.kept_by(forward, nn.Module()) == memory.Kept(0, 0)


def test_total_bytes_of_model_gradients_and_states():
    model = nn.Sequential(nn.Linear(K, N, bias=False), nn.Linear(K, N, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("buffer", torch.zeros(5))
    model[0].cache = {"slice": [torch.zeros(7)]}
    assert memory.total_bytes(memory.model_tensors(model)) == (K * N + 5 + 7) * FP32
    assert memory.total_bytes(memory.gradients(model)) == 0
    model[0](torch.randn(M, K)).sum().backward()
    assert memory.total_bytes(memory.gradients(model)) == K * N * FP32
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    optimizer.step()
    assert memory.total_bytes(memory.states(optimizer)) == (2 * K * N + 1) * FP32
