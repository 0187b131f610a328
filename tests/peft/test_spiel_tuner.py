"""The tuner of SpIEL: what it refuses, how it resumes, its memory, and several processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from peft import get_peft_model
from spiel_regression import AG, MA, config, delta_of, index_of, layer_of, one_step, regression
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2kernels.optim import SM3, AgedAdamW
from s2kernels.peft import SpIELTuner, make_optimizer, support_of
from s2kernels.peft.spiel.callback import load_tuner, save_tuner


def test_tuner_step_wants_the_gradients():
    base, x, y, _, _ = regression()
    model = get_peft_model(base, config())
    optimizer = make_optimizer(model, lr=0.01)
    tuner = SpIELTuner(model, optimizer, total_steps=50)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="after optimizer.step.. and before zero_grad"):
        tuner.step()


def test_tuner_step_notices_gradients_that_were_set_to_zero():
    """They would be counted as they are, and entries of no gradient at all would grow."""
    base, x, y, _, _ = regression()
    model = get_peft_model(base, config(accumulation_steps=2))
    optimizer = make_optimizer(model, lr=0.01)
    tuner = SpIELTuner(model, optimizer, total_steps=50)
    one_step(model, optimizer, tuner, x, y)
    (watch,) = tuner.watches
    before = index_of(model).clone(), watch.total.clone()
    (model(x) - y).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(ValueError, match="all 0, .* after optimizer.step.. and before zero_grad"):
        tuner.step()
    assert tuner.steps == watch.steps == 1
    assert torch.equal(index_of(model), before[0]) and torch.equal(watch.total, before[1])


@pytest.mark.parametrize("selection", (AG, MA))
def test_a_copy_of_model_and_optimizer_trains_as_they_do(selection):
    base, x, y, _, _ = regression()
    fields = dict(selection=selection, reselection_steps=4, accumulation_steps=2)
    model = get_peft_model(base, config(**fields))
    optimizer = make_optimizer(model, lr=0.02)
    tuner = SpIELTuner(model, optimizer, total_steps=30)
    for _ in range(7):
        one_step(model, optimizer, tuner, x, y)
    before = delta_of(model).detach().clone()
    twin, other = copy.deepcopy((model, optimizer))
    resumed = SpIELTuner(twin, other, total_steps=30)
    resumed.resume(7, {}, {})
    for _ in range(7, 15):
        one_step(twin, other, resumed, x, y)
    assert torch.equal(delta_of(model), before)  # the copy has parameters of its own
    for _ in range(7, 15):
        one_step(model, optimizer, tuner, x, y)
    assert torch.equal(index_of(twin), index_of(model))
    assert torch.equal(delta_of(twin), delta_of(model))
    assert not torch.equal(delta_of(model), before)


def test_refusals():
    model = get_peft_model(regression()[0], config())
    params = [delta_of(model)]
    with pytest.raises(TypeError, match="needs AgedAdamW, .* got RMSprop"):
        SpIELTuner(model, torch.optim.RMSprop(params), 10)
    with pytest.raises(ValueError, match="without 1 of them, such as that of 0"):
        SpIELTuner(model, AgedAdamW([params[0].detach().clone()]), 10)
    with pytest.raises(ValueError, match="no SpIEL adapter named 'other'"):
        SpIELTuner(model, AgedAdamW(params), 10, adapter_name="other")
    base, x, y, _, _ = regression()
    model = get_peft_model(base, config(selection=MA, accumulation_steps=1))
    with pytest.raises(TypeError, match="needs SM3 as its optimizer, got AgedAdamW"):
        SpIELTuner(model, AgedAdamW([delta_of(model)]), 10)
    optimizer = SM3([delta_of(model)])
    tuner = SpIELTuner(model, optimizer, 10)
    with pytest.raises(TypeError, match="SM3 does not know the weight of 0: make it by"):
        one_step(model, optimizer, tuner, x, y)
    tuner = SpIELTuner(model, SM3([delta_of(model)], supports=support_of(model)), 10)
    one_step(model, tuner.optimizer, tuner, x, y)


@pytest.mark.parametrize("selection", (AG, MA))
@pytest.mark.parametrize("at", (2, 3, 7, 13))
def test_training_resumes_in_the_middle_of_a_window(selection, at, tmp_path):
    """Bit for bit; 2 and 13 lie inside of windows."""
    base, x, y, _, _ = regression()
    fields = dict(selection=selection, reselection_steps=10, accumulation_steps=4)
    model = get_peft_model(base, config(**fields))
    optimizer = make_optimizer(model, lr=0.02)
    tuner = SpIELTuner(model, optimizer, total_steps=30)
    for step in range(1, 20):
        one_step(model, optimizer, tuner, x, y, micro_batches=2)
        if step == at:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            save_tuner(tmp_path, tuner)

    resumed = get_peft_model(regression()[0], config(**fields))
    resumed.load_state_dict(saved[0])
    twin = make_optimizer(resumed, lr=0.02)
    twin.load_state_dict(saved[1])
    other = SpIELTuner(resumed, twin, total_steps=30)
    load_tuner(tmp_path, other)
    assert other.steps == at
    for _ in range(at, 19):
        one_step(resumed, twin, other, x, y, micro_batches=2)
    assert torch.equal(index_of(resumed), index_of(model))
    assert torch.equal(delta_of(resumed), delta_of(model))

    wrong = get_peft_model(regression()[0], config(num_tunable_weights=30, **fields))
    small = SpIELTuner(wrong, make_optimizer(wrong, lr=0.1), total_steps=30)
    if selection == AG and at in (2, 13):
        with pytest.raises(ValueError, match=r"0\.\w+ has 40 entries, the layer 30"):
            load_tuner(tmp_path, small)
    small.selection = MA if selection == AG else AG
    with pytest.raises(ValueError, match=f"is of selection='{selection}'"):
        load_tuner(tmp_path, small)
    with pytest.raises(ValueError, match="there is no spiel_tuner.json"):
        load_tuner(tmp_path / "none", small)


class Largest(TorchDispatchMode):
    """The largest number of elements that an operator has returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in inputs:
                self.numel = max(self.numel, tensor.numel())
        return result


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("selection", (AG, MA))
def test_memory_beyond_the_base_grows_with_the_entries_alone(selection):
    """Nothing as large as a weight is made, in no phase; and what stays is a few numbers an entry,
    and for MA one a row and one a column.
    """
    N, K, k, tokens = 512, 384, 300, 8
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, N, bias=False))
    fields = dict(selection=selection, reselection_steps=4, accumulation_steps=2)
    with Largest() as making:
        model = get_peft_model(base, config(num_tunable_weights=k, mode="inplace", **fields))
        optimizer = make_optimizer(model, lr=0.01)
        tuner = SpIELTuner(model, optimizer, total_steps=20)
    x = torch.randn(tokens, K)
    with Largest() as working:
        for _ in range(7):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            tuner.step()
    assert tuner.steps == 7
    bound = N * K // 16 + 2 * k + tokens * N  # a strip of the gradient, entries, activations
    assert bound < N * K / 6
    assert making.numel <= bound and working.numel <= bound

    layer = layer_of(model)
    plans = [*layer._plans.values()]
    plans += [plan for watch in tuner.watches for plan in watch._plans or ()]
    base = layer.keeper.held_by_layer[layer].base
    held = [base, *layer.buffers(), *layer.spiel_delta.parameters()]
    held += [p.grad for p in layer.spiel_delta.parameters()]
    held += [vars(owner) for owner in (*plans, *tuner.watches)] + [dict(optimizer.state)]
    seen = {tensor.untyped_storage()._cdata: tensor.numel() for tensor in _tensors(held)}
    assert sum(seen.values()) <= 16 * k + (N + K if selection == MA else 0)


def spawned(rank, folder, results):
    """One of two processes that train replicas on different data."""
    from s2kernels.peft.spiel import reselection as tuner_module

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        base, x, y, _, _ = regression()
        model = get_peft_model(base, config(reselection_steps=8, accumulation_steps=3))
        parallel = nn.parallel.DistributedDataParallel(model)
        index = index_of(model)
        optimizer = make_optimizer(parallel, lr=0.05)
        tuner = SpIELTuner(parallel, optimizer, total_steps=40)
        chosen, seeds = [], []
        move = tuner_module.move_states

        def noting(optimizer, delta, replaced, seed):
            seeds.append([part.tolist() for part in seed[:2]] + [seed[2]])
            chosen.append(replaced.grown.tolist())
            move(optimizer, delta, replaced, seed)

        tuner_module.move_states = noting
        own_x, own_y = x[rank::2], y[rank::2]
        for _ in range(20):
            optimizer.zero_grad()
            for part in range(2):
                with parallel.no_sync() if part == 0 else SimpleContext():
                    rows = slice(part * 128, part * 128 + 128)
                    loss = (parallel(own_x[rows]) - own_y[rows]).square().sum() / 256
                    loss.backward()
            nn.utils.clip_grad_norm_(parallel.parameters(), 0.5)
            optimizer.step()
            tuner.step()
        assert len(chosen) == 3
        assert index is index_of(model) and index._version == 3  # a forward does not broadcast it
        torch.save((index_of(model), delta_of(model).detach(), chosen, seeds), results[rank])
    finally:
        dist.destroy_process_group()


class SimpleContext:
    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None


@pytest.mark.slow
def test_two_processes_select_the_same(tmp_path):
    """From different data; the seeds are of the mean gradient, and the states stay the same."""
    results = [str(tmp_path / f"{rank}.pt") for rank in range(2)]
    mp.spawn(spawned, args=(str(tmp_path), results), nprocs=2)
    first, second = (torch.load(path) for path in results)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2:] == second[2:]
    assert [seed[2] for seed in first[3]] == [2, 3, 3]  # the first step of a window only names
    support = regression()[3]
    assert torch.isin(support, first[0].long()).float().mean() > 0.9


@pytest.mark.parametrize("selection", (AG, MA))
def test_accelerate_saves_and_loads_the_tuner(selection, tmp_path):
    accelerator = Accelerator(cpu=True)
    fields = dict(selection=selection, reselection_steps=10, accumulation_steps=4)

    def made():
        base, x, y, _, _ = regression()
        model = get_peft_model(base, config(**fields))
        optimizer = accelerator.prepare(make_optimizer(model, lr=0.02))
        tuner = SpIELTuner(model, optimizer, total_steps=30)
        accelerator._custom_objects.clear(), accelerator._models.clear()
        accelerator._optimizers[:] = [optimizer]
        model = accelerator.prepare(model)
        accelerator.register_for_checkpointing(tuner)
        return model, optimizer, tuner, x, y

    model, optimizer, tuner, x, y = made()
    for step in range(1, 20):
        one_step(model, optimizer, tuner, x, y)
        if step == 13:
            accelerator.save_state(tmp_path)
    other, twin, its_tuner, x, y = made()
    accelerator.load_state(tmp_path)
    assert its_tuner.steps == 13
    for _ in range(13, 19):
        one_step(other, twin, its_tuner, x, y)
    assert torch.equal(index_of(other), index_of(model))
    assert torch.equal(delta_of(other), delta_of(model))


@pytest.mark.parametrize("name", ("spiel_tuner.json", "spiel_tuner.safetensors"))
def test_damaged_files_of_a_tuner_are_refused_by_name(name, tmp_path):
    base, x, y, _, _ = regression()
    model = get_peft_model(base, config(reselection_steps=10, accumulation_steps=4))
    optimizer = make_optimizer(model, lr=0.02)
    tuner = SpIELTuner(model, optimizer, total_steps=30)
    for _ in range(2):
        one_step(model, optimizer, tuner, x, y)
    save_tuner(tmp_path, tuner)
    path = tmp_path / name
    whole = path.read_bytes()
    texts = [whole[: len(whole) // 2], b"", b"\xff\xfe", b"[" * 100_000]
    if name.endswith("json"):
        texts += [b"[]", b"{}", b'{"steps": "2", "selection": 3}']
        texts.append(whole.replace(b'"0": 2', b'"0": "x"'))
        texts.append(whole.replace(b'"window"', b'"windows"'))
    for text in texts:
        assert text != whole
        path.write_bytes(text)
        with pytest.raises(ValueError, match=str(tmp_path)):
            load_tuner(tmp_path, tuner)
    path.unlink()
    with pytest.raises(ValueError, match=f"there is no {name}"):
        load_tuner(tmp_path, tuner)
    assert tuner.steps == 2
