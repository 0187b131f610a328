"""What SpIEL grows: the entries, what the optimizer is told of them, and which steps count."""

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from spiel_regression import AG, MA, config, delta_of, index_of, one_step, regression
from torch import nn

from s2kernels import backend, kernels, reference
from s2kernels.optim import SM3, AgedAdamW
from s2kernels.peft import SpIELTuner, make_optimizer


@pytest.mark.parametrize("mode", ("inplace", "additive"))
@pytest.mark.parametrize("make", (make_optimizer, "adamw"))
def test_accumulated_gradients_find_the_support(make, mode):
    base, x, y, support, true = regression(noise=0.1)
    model = get_peft_model(base, config(mode=mode, reselection_steps=10, accumulation_steps=3))
    if make == "adamw":
        optimizer = torch.optim.AdamW([delta_of(model)], lr=0.05, weight_decay=0.0)
    else:
        optimizer = make(model, lr=0.05)
    tuner = SpIELTuner(model, optimizer, total_steps=150)
    batches = torch.Generator().manual_seed(0)
    started = len(set(index_of(model).tolist()) & set(support.tolist()))
    for _ in range(150):
        rows = torch.randint(len(x), (64,), generator=batches)
        one_step(model, optimizer, tuner, x[rows], y[rows])
        index = index_of(model)
        assert len(index.unique()) == 40 and torch.equal(index, index.sort().values)
    found = torch.isin(support, index_of(model).long())
    assert started < 10
    assert found.float().mean() >= 0.95
    values = delta_of(model).detach()[torch.isin(index_of(model).long(), support)]
    assert (values - true[found]).abs().max() < 0.15


def test_momentum_approximation_grows_by_the_product_of_statistics():
    base, x, y, _, _ = regression()
    model = get_peft_model(base, config(selection=MA, reselection_steps=6, accumulation_steps=2))
    optimizer = make_optimizer(model, lr=0.1)
    assert isinstance(optimizer, SM3)
    tuner = SpIELTuner(model, optimizer, total_steps=60)
    reselections = 0
    for step in range(1, 31):
        before = index_of(model).clone(), delta_of(model).detach().clone()
        delta_before = before[1]
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        after_step = delta_of(model).detach().clone()
        assert not torch.equal(after_step, delta_before)
        tuner.step()
        index = index_of(model)
        assert len(index.unique()) == 40 and torch.equal(index, index.sort().values)
        if step % 6 != 2:
            assert torch.equal(index, before[0])
            continue
        reselections += 1
        num = tuner.schedule.count(step, 40)
        state = optimizer.state[delta_of(model)]
        assert set(state) == {"row", "col"} and state["row"].shape == (24,)
        scores = torch.outer(state["row"], state["col"]).flatten()
        scores[before[0].long()] = -1
        best = set(scores.sort(descending=True, stable=True).indices[:num].tolist())
        dropped = after_step.abs().sort(stable=True).indices[:num]
        stay = set(before[0].tolist()) - set(before[0][dropped].tolist())
        assert set(index.tolist()) == stay | best
        old = dict(zip(before[0].tolist(), after_step.tolist(), strict=True))
        want = [old[p] if p in stay else 0.0 for p in index.tolist()]
        assert delta_of(model).tolist() == want
    assert reselections == 5


@pytest.mark.parametrize("selection", (AG, MA))
def test_the_triton_kernels_select_the_same(selection, device, monkeypatch):
    results = []
    for ops in (reference, kernels):
        monkeypatch.setattr(backend, "select", lambda x, impl=None, ops=ops: ops)
        base, x, y, _, _ = regression()
        fields = dict(selection=selection, reselection_steps=4, accumulation_steps=2)
        model = get_peft_model(base.float().to(device), config(**fields))
        optimizer = make_optimizer(model, lr=0.05)
        tuner = SpIELTuner(model, optimizer, total_steps=20)
        x, y = x[:64].float().to(device), y[:64].float().to(device)
        for _ in range(7):
            one_step(model, optimizer, tuner, x, y)
        results.append((index_of(model), delta_of(model).detach()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)


def dense_gradients(x, y, weight):
    return (2 * (x @ weight.T - y).T @ x / len(x)).flatten()


@pytest.mark.parametrize("disturb", ("no", "micro-batches", "clipping", "loss scale"))
@pytest.mark.parametrize("kind", ("aged", "adamw"))
def test_grown_entries_begin_with_the_gradients_the_optimizer_would_have_got(kind, disturb):
    """In the mean over the window's steps, however a step's gradient comes about."""
    base, x, y, _, _ = regression()
    dense = base[0].weight.detach().clone()
    model = get_peft_model(base, config(reselection_steps=10, accumulation_steps=3))
    kinds = dict(aged=AgedAdamW, adamw=torch.optim.AdamW)
    optimizer = kinds[kind]([delta_of(model)], lr=0.01, betas=(0.8, 0.9))
    tuner = SpIELTuner(model, optimizer, total_steps=50)
    seen = []
    for _ in range(3):
        weight = dense.flatten().clone()
        weight[index_of(model).long()] += delta_of(model).detach()
        seen.append(dense_gradients(x, y, weight.view_as(dense)))
        optimizer.zero_grad()
        parts = 4 if disturb == "micro-batches" else 1
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = (model(part_x) - part_y).square().sum() / len(x)
            (loss * (2.0**16 if disturb == "loss scale" else 1)).backward()
        if disturb == "loss scale":
            delta_of(model).grad.div_(2.0**16)
        if disturb == "clipping":
            norm = nn.utils.clip_grad_norm_([delta_of(model)], 1e-3)
            seen[-1] *= 1e-3 / (norm + 1e-6)
        optimizer.step()
        tuner.step()

    grads = torch.stack(seen)
    state, index = optimizer.state[delta_of(model)], index_of(model).long()
    grown = delta_of(model) == 0
    assert grown.sum() >= 30  # the first reselection replaces nearly all
    mean, mean_square = grads.mean(0)[index], grads.square().mean(0)[index]
    # of equal age, 3 steps: bias correction gives the means back
    tolerance = dict(rtol=1e-9, atol=1e-15)
    corrected = state["exp_avg"] / (1 - 0.8**3), state["exp_avg_sq"] / (1 - 0.9**3)
    torch.testing.assert_close(corrected[0][grown], mean[grown], **tolerance)
    torch.testing.assert_close(corrected[1][grown], mean_square[grown], **tolerance)
    if kind == "aged":
        assert state["age"].tolist() == [3.0] * 40
    # the first micro-batch names the candidates: here W is W0
    num = len(x) // parts
    first = dense_gradients(x[:num], y[:num], dense)
    assert set(index.tolist()) == set(first.abs().topk(40).indices.tolist())


@pytest.mark.parametrize("kind", ("aged", "adamw", "sgd"))
def test_states_move_with_their_entries(kind):
    base, x, y, _, _ = regression()
    fields = dict(reselection_steps=10, accumulation_steps=2, replacement_schedule="cosine")
    model = get_peft_model(base, config(initial_replacement_rate=0.5, **fields))
    delta = delta_of(model)
    optimizer = dict(
        aged=lambda: AgedAdamW([delta], lr=0.01),
        adamw=lambda: torch.optim.AdamW([delta], lr=0.01, amsgrad=True),
        sgd=lambda: torch.optim.SGD([delta], lr=0.01, momentum=0.9),
    )[kind]()
    tuner = SpIELTuner(model, optimizer, total_steps=10**6)
    names = dict(
        aged=("exp_avg", "exp_avg_sq", "age"),
        adamw=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        sgd=("momentum_buffer",),
    )[kind]
    for step in range(1, 13):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        tensors = dict(delta=delta.detach(), grad=delta.grad)
        tensors |= {name: optimizer.state[delta][name] for name in names}
        positions = index_of(model).tolist()
        before = {k: dict(zip(positions, v.tolist(), strict=True)) for k, v in tensors.items()}
        tuner.step()
        now = index_of(model).tolist()
        kept = [i for i, p in enumerate(now) if p in positions]
        assert len(kept) == (40 if step not in (2, 12) else len(set(now) & set(positions)))
        if step in (2, 12):
            assert 20 <= len(kept) < 40
        for name, values in before.items():
            got = tensors[name].tolist()
            assert [got[i] for i in kept] == [values[now[i]] for i in kept], name
        grown = [i for i, p in enumerate(now) if p not in positions]
        assert all(delta[i] == 0 and delta.grad[i] == 0 for i in grown)
        if kind == "aged" and grown:
            ages = {optimizer.state[delta]["age"][i].item() for i in grown}
            assert ages == {2.0 if step == 2 else 3.0}


def test_a_step_with_gradients_that_are_not_finite_is_left_out():
    base, x, y, _, _ = regression()
    model = get_peft_model(base, config(reselection_steps=10, accumulation_steps=3))
    optimizer = make_optimizer(model, lr=0.01)
    tuner = SpIELTuner(model, optimizer, total_steps=50)
    for step in range(2):
        optimizer.zero_grad()
        (model(x) - y).square().mean().mul(float("inf") if step else 1.0).backward()
        if not step:  # GradScaler leaves the other one out
            optimizer.step()
        tuner.step()
    (watch,) = tuner.watches
    assert watch.steps == 1 and watch.total.isfinite().all()


@pytest.mark.parametrize("disturb", ("overflow", "no gradient", "no tokens"))
@pytest.mark.parametrize("distributed", (False, True))
def test_gradients_that_tell_no_entries_apart_name_no_candidates(disturb, distributed, tmp_path):
    """The next step does: the loss scale of fp16 overflows at the very start as a rule."""
    base, x, y, _, _ = regression()
    model = get_peft_model(base, config(reselection_steps=10, accumulation_steps=3))
    optimizer = make_optimizer(model, lr=0.01)
    tuner = SpIELTuner(model, optimizer, total_steps=50)
    if distributed:
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        tuner.group = dist.group.WORLD
    try:
        rows = slice(0 if disturb == "no tokens" else None)
        factor = float("inf") if disturb == "overflow" else 0.0
        (model(x[rows]) - y[rows]).square().sum().mul(factor).backward()
        tuner.step()
        (watch,) = tuner.watches
        assert watch.candidates is None and watch.steps == 0
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        tuner.step()
        want = dense_gradients(x, y, base[0].base_layer.weight.detach()).abs().topk(40).indices
        assert watch.candidates.tolist() == sorted(want.tolist())
        assert watch.steps == (0 if distributed else 1)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        tuner.step()  # selects
        assert not tuner.watches and set(index_of(model).tolist()) == set(want.tolist())
    finally:
        if distributed:
            dist.destroy_process_group()


def test_the_loss_scale_is_seen_where_most_outputs_have_no_gradient():
    """As GradScaler does: gradients of the backward are scaled, those of the optimizer are not."""
    base, x, y, _, _ = regression()
    model = get_peft_model(base, config(num_tunable_weights=300, accumulation_steps=3))
    optimizer = make_optimizer(model, lr=0.01)
    tuner = SpIELTuner(model, optimizer, total_steps=50)
    (model(x) - y).square().mean(0)[-4:].sum().mul(1024.0).backward()
    delta_of(model).grad /= 1024.0
    assert not delta_of(model).grad[:64].any()  # the entries of the first outputs
    optimizer.step()
    tuner.step()
    (watch,) = tuner.watches
    dy = torch.zeros_like(y)
    dy[:, -4:] = 2 * (x @ base[0].base_layer.weight.T - y)[:, -4:] / len(y)
    want = (dy.T @ x).flatten()[watch.candidates]
    torch.testing.assert_close(watch.total, want, rtol=1e-4, atol=1e-6)


def test_a_step_is_left_out_for_one_gradient_that_is_not_finite(monkeypatch):
    """As GradScaler does, wherever that gradient is: here far from the entry that is probed."""
    monkeypatch.setattr("s2kernels.peft.spiel.gradient_window.NUM_PROBES", 1)
    base, x, y, _, _ = regression()
    model = get_peft_model(base, config(num_tunable_weights=300, accumulation_steps=3))
    optimizer = make_optimizer(model, lr=0.01)
    tuner = SpIELTuner(model, optimizer, total_steps=50)
    (watch,) = tuner.watches
    for step in range(2):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean(0)
        (loss[:-1].sum() + loss[-1] * (float("inf") if step else 1.0)).backward()
        tuner.step()
    assert delta_of(model).grad[:64].isfinite().all() and watch.probed.tolist() == [0]
    assert watch.steps == 1 and watch.total.isfinite().all()


@pytest.mark.parametrize("factor", (0.0, float("inf")))
def test_gradients_may_be_zero_where_those_of_the_backward_tell_nothing(factor):
    """Those of a batch whose labels are all ignored count as 0; those that overflowed, and that
    somebody has set to 0 for it, do not count.
    """
    base, x, y, _, _ = regression()
    model = get_peft_model(base, config(accumulation_steps=3))
    optimizer = make_optimizer(model, lr=0.01)
    tuner = SpIELTuner(model, optimizer, total_steps=50)
    one_step(model, optimizer, tuner, x, y)
    before = tuner.watches[0].total.clone()
    (model(x) - y).square().mean().mul(factor).backward()
    optimizer.zero_grad(set_to_none=False)
    tuner.step()
    assert tuner.watches[0].steps == (2 if factor == 0 else 1)
    assert torch.equal(tuner.watches[0].total, before)
