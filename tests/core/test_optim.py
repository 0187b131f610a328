"""AdamW with ages and SM3: the equations, entry by entry."""

import copy
import pickle

import pytest
import torch
from torch import nn

from s2kernels.optim import SM3, AgedAdamW


def with_grads(params, generator):
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def randoms(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


@pytest.mark.parametrize("weight_decay", (0.0, 0.3))
def test_aged_adamw_is_adamw_while_no_entry_changes(weight_decay):
    ours, theirs = randoms((7,), (3, 5), ()), randoms((7,), (3, 5), ())
    options = dict(lr=0.02, betas=(0.8, 0.97), eps=1e-6, weight_decay=weight_decay)
    aged, adamw = AgedAdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(12):
        for params in (ours, theirs):
            with_grads(params, torch.Generator().manual_seed(step))
            params[0].grad = None if step == 4 else params[0].grad
        aged.step()
        adamw.step()
    assert aged.state[ours[0]]["age"].tolist() == [11.0] * 7
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_an_entry_is_corrected_for_its_own_age():
    """One that begins anew moves as the only entry of a new optimizer does."""
    (p,), (alone,) = randoms((5,)), randoms((1,))
    aged, fresh = AgedAdamW([p], lr=0.1), AgedAdamW([alone], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(9):
        with_grads([p], generator)
        if step == 4:
            for name in ("exp_avg", "exp_avg_sq", "age"):
                aged.state[p][name][2] = 0
            with torch.no_grad():
                p[2] = alone[0]
        if step >= 4:
            alone.grad = p.grad[2:3].clone()
            fresh.step()
        aged.step()
    assert aged.state[p]["age"].tolist() == [9, 9, 5, 9, 9]
    assert torch.equal(p[2:3], alone)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_unit_gradients_move_lr_a_step_for_ever(dtype):
    """Ages in the parameter's dtype would stop at 256 in bf16, or never leave 1."""
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    aged = AgedAdamW([p], lr=2.0**-10)
    for _ in range(300):
        p.grad = torch.ones_like(p)
        aged.step()
    assert aged.state[p]["age"].tolist() == [300.0] * 3
    assert {value.dtype for value in aged.state[p].values()} == {torch.float32}
    # in bf16 a step of 2**-10 is exact until 0.25, and an even chance of being lost after it
    assert p.tolist() == pytest.approx([-300 / 1024] * 3, rel=1e-4 if dtype.itemsize == 4 else 0.2)


@pytest.mark.parametrize("make", (lambda p: AgedAdamW(p, lr=0.01), lambda p: SM3(p, lr=0.1)))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_a_resumed_optimizer_goes_on_bit_for_bit(make, dtype):
    params = randoms((9,), (4, 3), (), dtype=dtype)
    optimizer = make(params)
    for step in range(3):
        with_grads(params, torch.Generator().manual_seed(step))
        optimizer.step()
    twins = copy.deepcopy(params)
    twin = make(twins)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, twins, strict=True):
        for name, value in optimizer.state[p].items():
            assert twin.state[q][name].dtype == value.dtype != torch.bfloat16
    for step in range(3, 6):
        for group, each in ((params, optimizer), (twins, twin)):
            with_grads(group, torch.Generator().manual_seed(step))
            each.step()
    for got, want in zip(twins, params, strict=True):
        assert torch.equal(got, want)


def test_sm3_on_a_delta_follows_the_equations():
    shape, steps = (5, 7), 6
    index = torch.tensor([0, 3, 8, 13, 20, 22, 34], dtype=torch.int32)
    (p,) = randoms((7,))
    want = p.detach().clone()
    row, col = [0.0] * 5, [0.0] * 7
    sm3 = SM3([p], lr=0.1, supports=lambda q: (shape, index) if q is p else None, weight_decay=0.5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        with_grads([p], generator)
        places = [divmod(int(i), 7) for i in index]
        nu = [
            min(row[r], col[c]) + float(g) ** 2
            for (r, c), g in zip(places, p.grad.tolist(), strict=True)
        ]
        for (r, c), value in zip(places, nu, strict=True):
            row[r], col[c] = max(row[r], value), max(col[c], value)
        scale = torch.tensor([(value + 1e-8) ** -0.5 for value in nu], dtype=torch.float64)
        want = want * (1 - 0.1 * 0.5) - 0.1 * p.grad * scale
        sm3.step()
    state = sm3.state[p]
    torch.testing.assert_close(p.detach(), want, rtol=1e-13, atol=0)
    torch.testing.assert_close(state["row"], torch.tensor(row, dtype=torch.float64))
    torch.testing.assert_close(state["col"], torch.tensor(col, dtype=torch.float64))
    assert state["row"][4] > 0 and state["col"][2] == 0  # no entry has column 2


def test_copies_and_pickles_of_sm3_keep_its_supports():
    (p,) = randoms((7,))
    sm3 = SM3([p], lr=0.1, supports=some_support)
    with_grads([p], torch.Generator().manual_seed(3))
    sm3.step()
    for twin in (copy.deepcopy(sm3), pickle.loads(pickle.dumps(sm3))):
        assert twin.supports is some_support
        (q,) = twin.param_groups[0]["params"]
        q.grad = p.grad.clone()
        twin.step()
        assert twin.state[q]["row"].shape == (5,) and twin.state[q]["col"].shape == (7,)
    (plain,) = randoms((7,))
    assert pickle.loads(pickle.dumps(SM3([plain]))).supports(plain) is None


def some_support(p):
    return (5, 7), torch.tensor([0, 3, 8, 13, 20, 22, 34], dtype=torch.int32)


def test_sm3_on_other_parameters_has_a_statistic_for_each_axis():
    """A dense matrix is a delta of all its entries; a vector and a number are Adagrad's."""
    (matrix, vector, number), (delta,) = randoms((3, 4), (5,), ()), randoms((12,))
    with torch.no_grad():
        delta.copy_(matrix.flatten())
    support = ((3, 4), torch.arange(12, dtype=torch.int32))
    dense = SM3([matrix, vector, number], lr=0.1)
    sparse = SM3([delta], lr=0.1, supports=lambda p: support)
    summed, expected = torch.zeros(5, dtype=torch.float64), vector.detach().clone()
    for step in range(5):
        with_grads([matrix, vector, number], torch.Generator().manual_seed(step))
        delta.grad = matrix.grad.flatten()
        summed += vector.grad.square()
        expected -= 0.1 * vector.grad / (summed + 1e-8).sqrt()
        dense.step()
        sparse.step()
    torch.testing.assert_close(matrix.flatten(), delta, rtol=1e-14, atol=0)
    torch.testing.assert_close(vector.detach(), expected, rtol=1e-13, atol=0)
    assert [value.numel() for value in dense.state[matrix].values()] == [3, 4]


def test_a_closure_is_evaluated_with_gradients():
    (p,) = randoms((3,))

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    before = closure().item()
    for optimizer in (AgedAdamW([p]), SM3([p])):
        p.grad = None
        assert optimizer.step(closure).item() <= before
        before = p.square().sum().item()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AgedAdamW(p, lr=-1.0), "lr must not be negative, got -1.0"),
        (lambda p: AgedAdamW(p, betas=(0.9, 1.0)), r"betas must lie in \[0, 1\)"),
        (lambda p: SM3(p, eps=-1e-8), "eps must not be negative"),
        (lambda p: SM3(p, weight_decay=-0.1), "weight_decay must not be negative"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make(randoms((2,)))
