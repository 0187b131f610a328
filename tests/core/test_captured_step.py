"""A captured step is the hand-written loop, to the bit; what cannot be captured is said."""

import importlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from captured_models import LR, METHODS, adamw, assert_same, batch, by_hand, prepared, record_steps
from peft import get_peft_model
from tiny_models import checkpoint_activations, tiny_model, token_ids
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from s2kernels import capture, captured_step
from s2kernels.kernels.slice_write import keeping_tables, slice_write
from s2kernels.peft import SpIELConfig

# not the function of that name, which the package exports
slice_write_kernel = importlib.import_module("s2kernels.kernels.slice_write")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


@pytest.fixture
def recorder(monkeypatch, device):
    record_steps(monkeypatch, device)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_gpu_it_is_the_loop(method):
    model, twin = prepared(method, "cpu")
    optimizer, other = adamw(model), adamw(twin)
    with pytest.warns(UserWarning, match="not captured.*on the device cpu"):
        step = capture(model, optimizer, max_norm=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(3):
            assert torch.equal(
                step(batch("cpu", i)), by_hand(twin, other, batch("cpu", i), max_norm=0.5)
            )
    assert_same(model, twin)
    assert (step.eager, step.replays) == (3, 0)


@pytest.mark.parametrize("method", METHODS)
def test_replays_are_the_loop(method, recorder, device):
    """With clipping, batches of two lengths, and a rate that is scheduled and assigned."""
    model, twin = prepared(method, device)
    optimizers = adamw(model), adamw(twin)
    schedules = [torch.optim.lr_scheduler.StepLR(each, 3, gamma=0.5) for each in optimizers]
    step = capture(model, optimizers[0], max_norm=0.5, warmup=2)
    for i in range(12):
        data = batch(device, i, length=9 if i % 3 else 6)
        loss = step(data)
        assert torch.equal(loss, by_hand(twin, optimizers[1], data, max_norm=0.5)), i
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)
        for schedule in schedules:
            schedule.step()
        if i == 7:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = LR / 8
    assert_same(model, twin)
    assert (step.eager, step.replays) == (4, 8)


def test_losses_are_not_one_tensor(recorder, device):
    model, _ = prepared("inplace", device)
    step = capture(model, adamw(model), warmup=1)
    losses = [step(batch(device, i)) for i in range(6)]
    assert len({float(loss) for loss in losses}) == 6


@pytest.mark.parametrize("method", ["inplace", "gather", "additive"])
def test_base_weights_come_back(method, recorder, device):
    before = tiny_model("llama", torch.float32).to(device).state_dict()
    model, _ = prepared(method, device)
    step = capture(model, adamw(model), warmup=1)
    for i in range(4):
        step(batch(device, i))
    after = model.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_of_another_shape_may_change_the_model(recorder, device):
    model, twin = prepared("full", device)

    def move(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 5:
            module.lm_head.weight.data = module.lm_head.weight.data.clone()

    optimizers = adamw(model), adamw(twin)
    step = capture(model, optimizers[0], warmup=1)
    model.register_forward_pre_hook(move, with_kwargs=True)
    for i, length in enumerate((9, 9, 5, 9, 9)):
        data = batch(device, i, length)
        assert torch.equal(step(data), by_hand(twin, optimizers[1], data)), i
    assert_same(model, twin)
    assert (step.eager, step.replays) == (3, 2)


def test_more_shapes_than_graphs(recorder, device, monkeypatch):
    monkeypatch.setattr(captured_step, "MAX_GRAPHS", 2)
    model, twin = prepared("inplace", device)
    optimizers = adamw(model), adamw(twin)
    step = capture(model, optimizers[0], warmup=1)
    for i in range(9):
        data = batch(device, i, length=5 + i % 3)
        if i == 5:
            with pytest.warns(UserWarning, match="not captured, since 2 other shapes are"):
                loss = step(data)
        else:
            loss = step(data)
        assert torch.equal(loss, by_hand(twin, optimizers[1], data)), i
    assert (step.eager, step.replays) == (5, 4)


def test_what_capture_refuses(recorder, device):
    model, _ = prepared("inplace", device)
    trained = [p for p in model.parameters() if p.requires_grad]
    for optimizer in (torch.optim.AdamW(trained), torch.optim.SGD(trained, lr=LR)):
        with pytest.raises(ValueError, match="optimizer must have capturable=True.*in group 0"):
            capture(model, optimizer)
    optimizer = adamw(model)
    with pytest.raises(ValueError, match="warmup must be 1 at least, got 0"):
        capture(model, optimizer, warmup=0)
    with pytest.raises(ValueError, match="max_norm must be positive, got 0"):
        capture(model, optimizer, max_norm=0)

    step = capture(model, optimizer)
    tokens = token_ids().to(device)
    with pytest.raises(TypeError, match="batch must be tensors by name, got a Tensor"):
        step(tokens)
    with pytest.raises(TypeError, match=r"batch\['labels'\] must be a tensor, got a list"):
        step({"input_ids": tokens, "labels": [1]})
    with pytest.raises(ValueError, match="returned no loss"):
        step({"input_ids": tokens})
    with torch.autocast(device.type, torch.float16), pytest.raises(ValueError, match="GradScaler"):
        step(batch(device, 0))
    optimizer.scaler = object()
    with pytest.raises(ValueError, match="optimizer must not be scaled"):
        capture(model, optimizer)


def test_obstacles():
    def obstacle(model, *devices):
        return captured_step._obstacle(model, [SimpleNamespace(device=d) for d in devices])

    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    model, _ = prepared("inplace", "cpu")
    assert obstacle(model, cuda, cuda) is None
    assert obstacle(model, cpu) == "what is trained lies on the device cpu"
    assert obstacle(model, cpu, cuda) == "what is trained lies on several devices, cpu, cuda:0"
    distributed = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(distributed)
    assert obstacle(nn.Sequential(distributed), cuda) == "the model is distributed"
    spiel = get_peft_model(tiny_model("llama", torch.float32), SpIELConfig(density=0.01))
    assert obstacle(spiel, cuda) == "SpIEL replaces entries between steps"


def test_tables_of_a_recording_are_kept(device):
    weight, base, delta = (torch.ones(3, n, device=device) for n in (5, 2, 2))
    with keeping_tables() as kept:
        slice_write([weight], [base], [delta], [slice(1, 3)], ["in"])
    assert len(kept) == 2 and kept[0].dtype == torch.int64
    assert kept[0].flatten()[0] == weight.data_ptr() + 4
    slice_write([weight], [base], [delta], [slice(1, 3)], ["in"])
    assert len(kept) == 2


def test_a_recording_that_does_not_fit(recorder, device):
    """It is what it is, and no step is lost: a batch of another shape goes on."""
    model, twin = prepared("inplace", device)
    recorded = []

    def loss(model, batch):
        if len(recorded) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        recorded.append(batch)
        return model(**batch).loss

    optimizers = adamw(model), adamw(twin)
    step = capture(model, optimizers[0], loss=loss, warmup=2)
    for i in range(2):
        assert torch.equal(step(batch(device, i)), by_hand(twin, optimizers[1], batch(device, i)))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        step(batch(device, 2))
    recorded.clear()
    data = batch(device, 3, length=5)
    assert torch.equal(step(data), by_hand(twin, optimizers[1], data))
    assert_same(model, twin)


@on_gpu
def test_tables_outlive_their_cache(device):
    model, twin = prepared("gather", device)
    optimizers = adamw(model), adamw(twin)
    step = capture(model, optimizers[0], warmup=1)
    for i in range(6):
        data = batch(device, i)
        assert torch.equal(step(data), by_hand(twin, optimizers[1], data)), i
        if i == 3:
            slice_write_kernel._table.cache_clear()
            torch.full((1 << 20,), -1, device=device)
    assert_same(model, twin)
    assert step.replays == 5


@on_gpu
@pytest.mark.parametrize("method", ["inplace", "full"])
def test_autocast(method, device):
    """Weights are cast anew in every replay."""
    model, twin = prepared(method, device)
    optimizers = adamw(model), adamw(twin)
    step = capture(model, optimizers[0], warmup=2)
    for i in range(6):
        data = batch(device, i)
        with torch.autocast("cuda", torch.bfloat16):
            loss = step(data)
        with torch.autocast("cuda", torch.bfloat16):
            expected = by_hand(twin, optimizers[1], data)
        assert torch.equal(loss, expected), i
    assert_same(model, twin)
    assert step.replays == 4


@on_gpu
def test_dropout_is_drawn_anew(device):
    model, _ = prepared("full", device)
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True, capturable=True)
    step = capture(model, optimizer, warmup=1)
    assert len({float(step(batch(device, 0))) for _ in range(6)}) == 6


@on_gpu
def test_checkpointing(device):
    model, twin = prepared("inplace", device)
    for each in (model, twin):
        checkpoint_activations(
            each.get_base_model(), {"use_reentrant": False, "preserve_rng_state": False}
        )
    optimizers = adamw(model), adamw(twin)
    step = capture(model, optimizers[0], warmup=2)
    for i in range(6):
        data = batch(device, i)
        torch.testing.assert_close(step(data), by_hand(twin, optimizers[1], data))
    assert step.replays == 4


# The last one: a capture that fails may leave torch unable to make others in this process.
@pytest.mark.parametrize("method", ["inplace", "additive"])
@pytest.mark.parametrize("where", ["loss", "forward"])
def test_what_cannot_be_recorded(where, method, recorder, device):
    """Says so and loses nothing: neither a step nor W0."""
    before = tiny_model("llama", torch.float32).to(device).state_dict()
    model, twin = prepared(method, device)

    def look(value):
        if torch.cuda.is_available() or value.requires_grad:
            value.sum().item()

    def waits(model, batch):
        loss = model(**batch).loss
        if where == "loss":
            look(loss)
        return loss

    if where == "forward":
        model.get_base_model().lm_head.register_forward_hook(lambda m, args, y: look(y))
    optimizers = adamw(model), adamw(twin)
    step = capture(model, optimizers[0], loss=waits, warmup=2)
    for i in range(2):
        assert torch.equal(step(batch(device, i)), by_hand(twin, optimizers[1], batch(device, i)))
    with pytest.raises(RuntimeError, match="cannot be captured"):
        step(batch(device, 2))
    assert_same(model, twin)
    after = model.unload().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
