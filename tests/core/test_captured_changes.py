"""A captured step stays the loop whatever is done to model and optimizer between steps."""

import copy

import pytest
import torch
from captured_models import LR, TARGETS, adamw, assert_same, batch, by_hand, prepared, record_steps
from torch import nn

from s2kernels import capture
from s2kernels.flat import FlatAdamW
from s2kernels.peft import S2FTConfig


@pytest.fixture
def recorder(monkeypatch, device):
    record_steps(monkeypatch, device)


def test_flat_optimizer(recorder, device):
    """Whose parameters, gradients and states are views of one buffer, written in the backward."""
    model, twin = prepared("inplace", device)
    optimizers = []
    for each in (model, twin):
        deltas = [p for p in each.parameters() if p.requires_grad]
        optimizers.append(FlatAdamW(deltas, LR, capturable=True, accumulate_in_backward=True))
    step = capture(model, optimizers[0], max_norm=0.5, warmup=2)
    for i in range(7):
        data = batch(device, i)
        assert torch.equal(step(data), by_hand(twin, optimizers[1], data, max_norm=0.5)), i
        if i == 3:
            for optimizer in optimizers:
                load(None, optimizer)
    assert_same(model, twin)
    assert (step.eager, step.replays) == (4, 3)


def test_a_rate_that_is_a_tensor(recorder, device):
    """Whoever made it may write to it, too."""
    model, twin = prepared("inplace", device)
    rates, optimizers = [], []
    for each in (model, twin):
        trained = [p for p in each.parameters() if p.requires_grad]
        rates.append(torch.tensor(LR, device=device))
        optimizers.append(torch.optim.AdamW(trained, lr=rates[-1], fused=True, capturable=True))
    step = capture(model, optimizers[0], warmup=1)
    for i in range(5):
        data = batch(device, i)
        assert torch.equal(step(data), by_hand(twin, optimizers[1], data)), i
        for rate in rates:
            rate.mul_(0.5)
    assert_same(model, twin)
    assert step.replays == 4


def test_gradients_that_nobody_trains_with(recorder, device):
    """They are those of the step, and a recording adds to no memory that was given back."""
    model, twin = prepared("inplace", device)
    optimizers = adamw(model), adamw(twin)
    heads = [each.get_base_model().lm_head.weight.requires_grad_() for each in (model, twin)]
    step = capture(model, optimizers[0], warmup=1)
    for i in range(4):
        if i != 2:
            model.zero_grad()
        twin.zero_grad()
        data = batch(device, i)
        assert torch.equal(step(data), by_hand(twin, optimizers[1], data)), i
        assert torch.equal(heads[0].grad, heads[1].grad), i
    assert step.replays == 3


def test_a_scale_of_lora(recorder, device):
    model, twin = prepared("lora", device)
    optimizers = adamw(model), adamw(twin)
    step = capture(model, optimizers[0], warmup=1)
    for i in range(6):
        if i == 3:
            for each in (model, twin):
                each.get_base_model().model.layers[1].mlp.down_proj.scale_layer(2.0)
        data = batch(device, i)
        assert torch.equal(step(data), by_hand(twin, optimizers[1], data)), i
    assert (step.eager, step.replays) == (2, 4)


def test_parameters_that_were_replaced_are_clipped(recorder, device):
    model, twin = prepared("full", device)
    optimizers = adamw(model), adamw(twin)
    step = capture(model, optimizers[0], max_norm=0.5, warmup=1)
    for i in range(4):
        if i == 2:
            for each, optimizer in zip((model, twin), optimizers, strict=True):
                each.load_state_dict(copy.deepcopy(each.state_dict()), assign=True)
                optimizer.state.clear()
                optimizer.param_groups[0]["params"] = list(each.parameters())
        data = batch(device, i)
        loss, expected = step(data), by_hand(twin, optimizers[1], data, max_norm=0.5)
        assert torch.equal(loss, expected), i
    assert_same(model, twin)


def test_recording_anew_while_a_gradient_is_held(recorder, device):
    """It lies in the memory of graphs that are gone."""
    model, twin = prepared("inplace", device)
    optimizers = adamw(model), adamw(twin)
    step = capture(model, optimizers[0], warmup=1)
    held = []
    for i in range(6):
        data = batch(device, i)
        assert torch.equal(step(data), by_hand(twin, optimizers[1], data)), i
        held += [p.grad for p in model.parameters() if p.grad is not None]
        if i == 2:
            model.state_dict(), twin.state_dict()
    assert_same(model, twin)
    assert (step.eager, step.replays) == (2, 4)


def test_options_that_were_loaded(recorder, device):
    """load_state_dict takes capturable from what was saved."""
    model, _ = prepared("inplace", device)
    optimizer = adamw(model)
    step = capture(model, optimizer, warmup=1)
    step(batch(device, 0))
    state = optimizer.state_dict()
    state["param_groups"][0]["capturable"] = False
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="optimizer must have capturable=True.*in group 0"):
        step(batch(device, 1))


def test_flat_optimizer_whose_steps_part(recorder, device):
    """A step of another shape that leaves a parameter out: their counts are two tensors then."""

    def loss(model, batch):
        x = batch["x"]
        return (model[0](x).sum() + (model[1](x).sum() if len(x) > 2 else 0)) ** 2

    model = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(2)).to(device)
    twin = copy.deepcopy(model)
    optimizers = [FlatAdamW(each.parameters(), LR, capturable=True) for each in (model, twin)]
    step = capture(model, optimizers[0], loss=loss, warmup=1)
    for i, length in enumerate((3, 3, 2, 3, 3)):
        data = {"x": torch.randn(length, 32, generator=torch.Generator().manual_seed(i)).to(device)}
        step(data)
        optimizers[1].zero_grad()
        loss(twin, data).backward()
        optimizers[1].step()
        assert_same(model, twin)
    assert (step.eager, step.replays) == (3, 2)


def evaluate(model, optimizer):
    with torch.no_grad():
        model.eval()(**batch(model.device, 99))
    model.train()


def disable(model, optimizer):
    with model.disable_adapter():
        evaluate(model, optimizer)


def merge(model, optimizer):
    model.merge_adapter()
    evaluate(model, optimizer)
    model.unmerge_adapter()


def load(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def save_and_evaluate(model, optimizer):
    model.state_dict()
    evaluate(model, optimizer)


def decay(model, optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.25


def move(model, optimizer):
    for p in model.parameters():
        p.data = p.data.clone()


def replace_parameter(model, optimizer):
    head = model.get_base_model().lm_head
    head.weight = nn.Parameter(2 * head.weight.detach(), requires_grad=False)


def replace_module(model, optimizer):
    base = model.get_base_model()
    base.lm_head = copy.deepcopy(base.lm_head)
    base.lm_head.weight.data.mul_(2)


def part_in_eval(model, optimizer):
    model.get_base_model().model.layers[0].eval()


def clear_state(model, optimizer):
    optimizer.state.clear()


# what is done between two steps, and whether a recording survives it
BETWEEN = {
    "evaluate": (evaluate, True),
    "state_dict": (lambda model, optimizer: model.state_dict(), False),
    "state_dict and evaluate": (save_and_evaluate, False),
    "disable": (disable, False),
    "merge": (merge, False),
    "load the optimizer": (load, False),
    "weight decay": (decay, False),
    "move": (move, False),
    "replace a parameter": (replace_parameter, False),
    "replace a module": (replace_module, False),
    "a part in eval": (part_in_eval, False),
    "clear the states": (clear_state, False),
}
# they change nothing where no slices are written
OF_SLICES = ("state_dict", "state_dict and evaluate", "disable", "merge")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["inplace", "gather", "additive"])
@pytest.mark.parametrize("between", BETWEEN)
def test_what_is_done_between_steps(between, method, recorder, device):
    model, twin = prepared(method, device)
    optimizers = adamw(model), adamw(twin)
    step = capture(model, optimizers[0], warmup=1)
    action, survives = BETWEEN[between]
    for i in range(6):
        data = batch(device, i)
        assert torch.equal(step(data), by_hand(twin, optimizers[1], data)), i
        if i == 3:
            action(model, optimizers[0])
            action(twin, optimizers[1])
    assert_same(model, twin)
    if method == "inplace" or between not in OF_SLICES:
        assert (step.eager, step.replays) == ((1, 5) if survives else (2, 4))


def test_another_adapter(recorder, device):
    model, _ = prepared("inplace", device)
    model.add_adapter("other", S2FTConfig(target_modules=TARGETS, heads=1, channels=4, seed=3))
    twin = copy.deepcopy(model)
    optimizers = []
    for each in (model, twin):
        deltas = [p for name, p in each.named_parameters() if "s2ft_delta" in name]
        optimizers.append(torch.optim.AdamW(deltas, lr=LR, fused=True, capturable=True))
    step = capture(model, optimizers[0], warmup=1)
    for i in range(8):
        for each in (model, twin):
            each.set_adapter("other" if i >= 4 else "default")
        data = batch(device, i)
        assert torch.equal(step(data), by_hand(twin, optimizers[1], data)), i
    assert_same(model, twin)
    assert (step.eager, step.replays) == (2, 6)
