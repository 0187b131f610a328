"""FlatAdamW: bit for bit torch's fused AdamW, in one launch, whatever happens to the parameters."""

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import tiny_model, token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2kernels.flat import FlatAdamW
from s2kernels.peft import S2FTConfig

# of whole vectors of the CPU: of what is left over, scalar code may round the last bit otherwise
SHAPES = ((8, 4), (32,), (64, 3), (64,), (2, 3, 16), (4, 8))
ODD_SHAPES = ((7, 3), (1,), (33, 5), (), (2, 0), (5, 7))
OPTIONS = dict(lr=0.02, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.1)


def randoms(*shapes, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(value.to(device, dtype)) for value in values]


def give_grads(params, step, without=()):
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        p.grad = None if i in without else grad


def steps(params, optimizer, numbers, without=lambda step: ()):
    for step in numbers:
        give_grads(params, step, without(step))
        optimizer.step()


def assert_same(ours, theirs, flat=None, torchs=None):
    """Parameters are equal, and states, where optimizers are given; ours lie in one storage."""
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got, want)
        if flat is not None:
            assert flat.state[got].keys() == torchs.state[want].keys()
            for name, value in torchs.state[want].items():
                assert torch.equal(flat.state[got][name], value), name
    assert len({p.untyped_storage().data_ptr() for p in ours}) == 1


class Ops(TorchDispatchMode):
    """The operators that were called, by name, with the shapes of the tensors they came with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not name.startswith("_record_function"):  # a range of the profiler
            given = args[0] if isinstance(args[0], list) else [args[0]]
            shapes = [tuple(x.shape) for x in given if isinstance(x, torch.Tensor)]
            self.calls.append((name, shapes))
        return func(*args, **(kwargs or {}))

    def named(self, name):
        return [shapes for called, shapes in self.calls if called == name]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_twenty_steps_are_those_of_torch_bit_for_bit(dtype, device):
    ours, theirs = (randoms(*SHAPES, dtype=dtype, device=device) for _ in range(2))
    flat, torchs = FlatAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    steps(ours, flat, range(20))
    steps(theirs, torchs, range(20))
    assert_same(ours, theirs, flat, torchs)
    assert all((p.data_ptr() - ours[0].data_ptr()) % 128 == 0 for p in ours)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_odd_sizes_and_strides(dtype, device):
    ours, theirs = (randoms(*ODD_SHAPES, dtype=dtype, device=device) for _ in range(2))
    ours[2].data = ours[2].data.t().contiguous().t()
    flat, torchs = FlatAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    steps(ours, flat, range(20))
    steps(theirs, torchs, range(20))
    for got, want in zip(ours, theirs, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, want, rtol=0, atol=20 * torch.finfo(dtype).eps)
    everything = torch.empty(0, dtype=dtype, device=device).set_(ours[0].untyped_storage())
    assert everything.count_nonzero() == sum(p.numel() for p in ours) < everything.numel()


def test_groups_schedules_and_dtypes():
    shapes = ((8, 4), (32,), (2, 16), (64,))
    rates = []
    for make in (FlatAdamW, lambda groups: torch.optim.AdamW(groups, fused=True)):
        params = randoms(*shapes)
        params[3].data = params[3].data.double()
        params.append(nn.Parameter(torch.ones(3), requires_grad=False))
        frozen = params[4].data_ptr()
        optimizer = make([
            dict(params=params[:2], lr=0.1, weight_decay=0.5, betas=(0.5, 0.9)),
            dict(params=params[2:], lr=0.01, weight_decay=0.0),
        ])  # fmt: skip
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
        for step in range(6):
            give_grads(params[:4], step)
            optimizer.step()
            schedule.step()
        assert params[4].data_ptr() == frozen and torch.equal(params[4], torch.ones(3))
        rates.append((params, [group["lr"] for group in optimizer.param_groups]))
    (ours, got), (theirs, want) = rates
    assert got == want
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "without",
    (
        lambda step: (),
        lambda step: (2,),
        lambda step: (0, 5) if step == 3 else (),
        lambda step: (step % 6, 1),
        lambda step: range(6) if step == 1 else range(step % 3),
    ),
    ids=("none", "never one", "once", "in turn", "all"),
)
def test_parameters_without_gradient_are_skipped_as_torch_skips_them(without):
    ours, theirs = randoms(*SHAPES), randoms(*SHAPES)
    flat, torchs = FlatAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step in range(9):
        for params, optimizer in ((ours, flat), (theirs, torchs)):
            steps(params, optimizer, [step], without)
        assert {i for i, p in enumerate(ours) if p in flat.state} == {
            i for i, p in enumerate(theirs) if p in torchs.state
        }
    assert_same(ours, theirs)
    for got, want in zip(ours, theirs, strict=True):
        for name, value in torchs.state.get(want, {}).items():
            assert torch.equal(flat.state[got][name], value), name
    # a copy of it, with step counts read anew, goes on as the first does
    again = randoms(*SHAPES)
    for p, q in zip(again, ours, strict=True):
        p.data = q.detach().clone()
    twin = FlatAdamW(again, **OPTIONS)
    twin.load_state_dict(flat.state_dict())
    steps(again, twin, range(9, 12), without)
    steps(ours, flat, range(9, 12), without)
    assert_same(again, ours, twin, flat)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("saves", ("flat", "torch", "torch foreach"))
def test_states_load_into_torchs_adamw_and_back(saves):
    """Both ways, to the bit: nobody who trained with one has to stay with it."""
    first, second = randoms(*SHAPES), randoms(*SHAPES)

    def adamw(params):
        return torch.optim.AdamW(params, **OPTIONS, fused=saves == "torch")

    makers = [lambda params: FlatAdamW(params, **OPTIONS), adamw]
    make, other = makers if saves == "flat" else makers[::-1]
    optimizer = make(first)
    steps(first, optimizer, range(4), lambda step: (1,) if step < 2 else (5,))
    state = through_a_file(optimizer.state_dict())
    loaded = other(second)
    steps(second, loaded, range(2))  # what it holds is replaced
    for p, q in zip(second, first, strict=True):
        p.data.copy_(q.data)
    addresses = [p.data_ptr() for p in second]
    loaded.load_state_dict(state)
    assert [p.data_ptr() for p in second] == addresses
    torchs = torch.optim.AdamW(first, **OPTIONS, fused=True)
    torchs.load_state_dict(copy.deepcopy(state))
    for each in (torchs, loaded):
        if type(each) is FlatAdamW:
            assert each.param_groups[0]["fused"]
        else:
            each.param_groups[0].update(fused=True, foreach=None)
    for params, each in ((first, torchs), (second, loaded)):
        steps(params, each, range(4, 8), lambda step: (1,) if step == 5 else ())
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p, q)
        for name, value in torchs.state[p].items():
            assert torch.equal(value.float(), loaded.state[q][name].float()), name


def test_a_saved_state_is_not_written_to_by_later_steps_of_who_loads_it():
    params, others = randoms(*SHAPES), randoms(*SHAPES)
    first, second = FlatAdamW(params, **OPTIONS), FlatAdamW(others, **OPTIONS)
    steps(params, first, range(2))
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.state_dict()["state"])
    steps(others, second, range(2, 4))
    for key, state in first.state_dict()["state"].items():
        assert all(torch.equal(value, before[key][name]) for name, value in state.items())


def test_one_launch_over_one_tensor():
    params = randoms((5, 3), (9,), (2, 2), (8, 8))
    flat = FlatAdamW(params, **OPTIONS)
    steps(params, flat, range(2))
    # of 15, 9, 4 and 64 numbers, each from a multiple of 32 on
    size = 3 * 32 + 64
    with Ops() as ops:
        flat.step()
        flat.zero_grad(set_to_none=False)
    (updated,) = ops.named("_fused_adamw_")
    assert updated == [(size,)]
    assert ops.named("zero_") == [updated]
    assert not any(p.grad.any() for p in params)
    assert {name for name, _ in ops.calls} == {"_fused_adamw_", "_foreach_add_", "zero_", "slice"}
    with Ops() as ops:
        flat.zero_grad()
    assert not ops.calls and all(p.grad is None for p in params)
    with Ops() as ops:
        steps(params, flat, [3])
    assert len(ops.named("_foreach_copy_")) == len(ops.named("_fused_adamw_")) == 1


def test_zero_grad_keeps_no_gradient_wherever_it_lies():
    params = randoms((3,), (4,))
    flat = FlatAdamW(params)
    steps(params, flat, [0])
    params[1].grad = torch.ones(4)
    flat.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in params)
    params[0].grad = None
    flat.zero_grad(set_to_none=False)
    assert params[0].grad is None and not params[1].grad.any()


@pytest.mark.parametrize("how", ("to", "data", "another optimizer"))
@pytest.mark.parametrize("bound", (True, False), ids=("grads bound", "grads dropped"))
def test_parameters_that_moved_are_laid_out_anew(how, bound):
    ours, theirs = randoms(*SHAPES), randoms(*SHAPES)
    flat, torchs = FlatAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for params, optimizer in ((ours, flat), (theirs, torchs)):
        steps(params, optimizer, range(3))
        if not bound:
            optimizer.zero_grad()
    if how == "to":
        nn.ParameterList(ours).double().float()
    elif how == "data":
        ours[2].data = ours[2].data.clone()
    else:
        FlatAdamW(ours)
    if bound:  # gradients that came along count
        flat.step()
        torchs.step()
    for params, optimizer in ((ours, flat), (theirs, torchs)):
        steps(params, optimizer, range(3, 6))
    assert_same(ours, theirs, flat, torchs)


def test_a_change_of_dtype_takes_the_states_along():
    params = randoms((5,), (3, 3))
    flat = FlatAdamW(params, **OPTIONS)
    steps(params, flat, range(2))
    nn.ParameterList(params).double()
    twin = copy.deepcopy(params)
    torchs = torch.optim.AdamW(twin, **OPTIONS, fused=True)
    torchs.load_state_dict(copy.deepcopy(flat.state_dict()))
    for each, optimizer in ((params, flat), (twin, torchs)):
        steps(each, optimizer, range(2, 4))
    assert flat.state[params[0]]["exp_avg"].dtype == torch.float64
    assert_same(params, twin, flat, torchs)


def test_a_parameter_that_comes_to_be_trained_joins():
    ours, theirs = randoms(*SHAPES), randoms(*SHAPES)
    for params in (ours, theirs):
        params[1].requires_grad_(False)
    flat, torchs = FlatAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for params, optimizer in ((ours, flat), (theirs, torchs)):
        steps(params, optimizer, range(2), lambda step: (1,))
        params[1].requires_grad_(True)
        params[0].requires_grad_(False)
        steps(params, optimizer, range(2, 5), lambda step: (0,))
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(3))], lr=1.0))
        steps([*params, optimizer.param_groups[1]["params"][0]], optimizer, range(5, 7))
    assert_same(ours, theirs, flat, torchs)
    added = [optimizer.param_groups[1]["params"][0] for optimizer in (flat, torchs)]
    assert torch.equal(*added) and not torch.equal(added[0], torch.ones(3))


def test_a_deep_copy_goes_on_apart():
    params = randoms(*SHAPES)
    flat = FlatAdamW(params, **OPTIONS, accumulate_in_backward=True)
    steps(params, flat, range(2))
    twins, twin = copy.deepcopy((params, flat))
    before = [p.detach().clone() for p in params]
    steps(twins, twin, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    steps(params, flat, range(2, 4))
    assert_same(twins, params, twin, flat)
    assert twin.accumulate_in_backward


def test_a_grad_scaler_scales_skips_and_clips():
    results = []
    for make in (FlatAdamW, lambda p, **options: torch.optim.AdamW(p, **options, fused=True)):
        params = randoms(*SHAPES)
        optimizer = make(params, **OPTIONS)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        scaler.scale(torch.ones(()))
        for step in range(6):
            give_grads(params, step, (2,) if step == 4 else ())
            for p in params:
                if p.grad is not None:
                    p.grad *= scaler.get_scale()
            if step == 2:
                params[3].grad[1] = float("inf")
            if step == 3:
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(params, 0.5)
            scaler.step(optimizer)
            scaler.update()
        results.append((params, optimizer, norm, scaler.get_scale()))
    (ours, flat, norm, scale), (theirs, torchs, wanted_norm, wanted_scale) = results
    assert torch.equal(norm, wanted_norm) and scale == wanted_scale
    assert_same(ours, theirs, flat, torchs)
    assert flat.state[ours[0]]["step"] == 5 and flat.state[ours[2]]["step"] == 4


def test_a_step_between_forward_and_backward_is_noticed():
    params = randoms((3,), (3,))
    flat = FlatAdamW(params)
    y = (params[0] * params[1]).sum()
    steps(params, flat, [0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "p",
    (
        nn.Parameter(torch.zeros(3, device="meta")),
        nn.Parameter(torch.zeros(3, dtype=torch.complex64)),
        nn.Parameter(torch.zeros(3).as_subclass(Wrapped)),
    ),
    ids=("meta", "complex", "subclass"),
)
def test_refused_parameters_leave_all_as_it_was(p):
    params = randoms((3,), (4,))
    addresses = [q.data_ptr() for q in params]
    with pytest.raises(ValueError, match="params must be plain floating .* shape \\(3,\\)"):
        FlatAdamW([*params, p])
    assert [q.data_ptr() for q in params] == addresses
    flat = FlatAdamW(params)
    with pytest.raises(ValueError, match="params must be plain floating"):
        flat.add_param_group(dict(params=[p]))
    assert len(flat.param_groups) == 1
    steps(params, flat, range(2))


def test_parameters_over_the_same_memory_are_refused():
    (p,) = randoms((3,))
    with pytest.raises(ValueError, match="params must have memory of their own"):
        FlatAdamW([p, nn.Parameter(p.detach())])


def test_refused_states_leave_all_as_it_was():
    params = randoms((3,), (4,))
    flat = FlatAdamW(params, **OPTIONS)
    steps(params, flat, [0])
    before = copy.deepcopy(flat.state_dict())
    for options, shapes, message in (
        (dict(amsgrad=True), ((3,), (4,)), "no amsgrad"),
        (dict(maximize=True), ((3,), (4,)), "no maximize"),
        ({}, ((3,), (5,)), "of shape \\(4,\\) must"),
    ):
        others = randoms(*shapes)
        other = torch.optim.AdamW(others, **options)
        steps(others, other, [0])
        with pytest.raises(ValueError, match=message):
            flat.load_state_dict(other.state_dict())
        state = flat.state_dict()
        assert state["param_groups"] == before["param_groups"]
        assert all(torch.equal(state["state"][1][n], v) for n, v in before["state"][1].items())
    momentum = torch.optim.SGD(params, momentum=0.9)
    steps(params, momentum, [1])
    with pytest.raises(ValueError, match="'exp_avg': None"):
        flat.load_state_dict(momentum.state_dict())
    sparse = nn.Embedding(4, 3, sparse=True)
    flat = FlatAdamW(sparse.parameters())
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        flat.step()


def s2ft(mode="auto", **config):
    wanted = ["q_proj", "o_proj", "down_proj"]
    config = S2FTConfig(heads=2, channels=8, mode=mode, target_modules=wanted, **config)
    return get_peft_model(tiny_model("llama", torch.float32), config)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer, numbers=range(4), micro_batches=1):
    for step in numbers:
        optimizer.zero_grad()
        for part in range(micro_batches):
            ids = token_ids(seed=10 * step + part)
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("mode", ("inplace", "additive"))
def test_an_s2ft_model_trains_to_the_same_bits(mode, tmp_path):
    ours, theirs = s2ft(mode), s2ft(mode)
    flat = FlatAdamW(ours.parameters(), **OPTIONS)  # frozen ones, too, as scripts often do
    train(ours, flat, micro_batches=2)
    train(theirs, torch.optim.AdamW(trained(theirs), **OPTIONS, fused=True), micro_batches=2)
    assert_same(trained(ours), trained(theirs))
    assert trained(ours)[0].abs().max() > 0.01
    # an adapter is saved as tensors that share nothing
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path)
    assert torch.equal(loaded(token_ids()).logits, ours(token_ids()).logits)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 60_000


def test_several_adapters_and_one_deleted():
    ours, theirs = s2ft("additive"), s2ft("additive")
    optimizers = []
    for model, make in ((ours, FlatAdamW), (theirs, lambda p: torch.optim.AdamW(p, fused=True))):
        model.add_adapter("other", S2FTConfig(heads=2, channels=4, mode="additive", seed=3))
        optimizer = make([p for n, p in model.named_parameters() if "s2ft_delta" in n])
        optimizer.param_groups[0]["lr"] = 0.01
        train(model, optimizer, range(2))
        model.set_adapter("other")
        train(model, optimizer, range(2, 4))
        model.set_adapter("default")
        model.delete_adapter("other")
        train(model, optimizer, range(4, 6))
        optimizers.append(optimizer)
    assert len(trained(ours)) == 6
    params = [optimizer.param_groups[0]["params"] for optimizer in optimizers]
    assert len(params[0]) == 10
    for got, want in zip(*params, strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", (False, True))
def test_transformers_trainer(accumulate, tmp_path):
    """Clipping, accumulation, a schedule and resuming, with the Trainer's own zero_grad."""
    from transformers import Trainer, TrainingArguments

    ids = token_ids(batch=16)
    rows = [dict(input_ids=row, labels=row) for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, max_grad_norm=0.5, lr_scheduler_type="linear",
        report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip

    def run(make, **resume):
        model = s2ft()
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(make(model), None))
        trainer.train(**resume)
        return torch.cat([p.detach().flatten() for p in trained(model)])

    def flat(model):
        return FlatAdamW(trained(model), **OPTIONS, accumulate_in_backward=accumulate)

    want = run(lambda model: torch.optim.AdamW(trained(model), **OPTIONS, fused=True))
    got = run(flat)
    assert torch.equal(run(flat, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), got)
    if accumulate:  # sums are rounded elsewhere
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    else:
        assert torch.equal(got, want)
    assert want.abs().max() > 0.01
