"""Predictions of a step: equal to what a real one keeps and multiplies, and a line in depth."""

import inspect
import resource
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import memory
from bench.methods import METHODS, Budget, Options, comparable
from bench.methods.spiel import SpIEL
from bench.predict import counted, main, predict
from bench.steps import work
from bench.steps.cases import Case
from bench.steps.counting import dry_run
from bench.steps.model_shapes import TABLE, Shape
from s2kernels import reference

# Widths that divide nothing, grouped heads whose widths do not add up to the hidden size, qwen's
# norms of heads and biases, an embedding that is the head too.
GROUPED = Shape("grouped", "llama", 48, 104, 2, 6, 2, 16, 97, 2, 97)
SHAPES = [
    GROUPED,
    replace(GROUPED, name="qwen3", model_type="qwen3", kv_heads=3, tied=True),
    replace(GROUPED, name="qwen2", model_type="qwen2", heads=5, kv_heads=5),
]
BUDGET = Budget(
    heads=1,
    channels=7,
    rank=4,
    seed=0,
    shira_rank=3,
    galore_rank=4,
    reft_rank=3,
    reft_positions=2,
    lisa_layers=1,
)
OPTIONS = [
    Options(checkpointing=checkpointing, full_depth=full_depth)
    for checkpointing in (False, True)
    for full_depth in (False, True)
]
# What S2FT and SpIEL run on a GPU are kernels of their own.
OF_TORCH = ("frozen", "full", "lora", "lora_fp32", "dora", "lisa")


@pytest.fixture(autouse=True)
def _empty_tensors_are_not_filled(monkeypatch):
    """As deterministic algorithms have it, which would take the memory of a whole model."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.fixture(params=METHODS)
def name(request):
    if request.param == "galore":
        pytest.importorskip("galore_torch")
    return request.param


def at_work(name, shape, length, dtype, options=OPTIONS[0]):
    """The method after a first step, in which some make what they hold from then on."""
    method = METHODS[name](shape.build(length, dtype, "cpu"), BUDGET, 1e-3, options)
    if isinstance(method, SpIEL):
        method.tuner.resume(method.config.accumulation_steps + 1, {}, {})
    method.step(torch.zeros(1, length, dtype=torch.int64))
    method.zero_grad()
    return method


def tokens(shape, batch, length):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocab, (batch, length), generator=generator)


def expected(shape, batch, length, dtype, name, options=OPTIONS[0], device="cpu"):
    dtype = str(dtype).removeprefix("torch.")
    return predict(Case((), shape, batch, length, dtype, name, options), BUDGET, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes_are_those_of_a_real_forward(name, dtype):
    # All options come up, and all shapes in both dtypes.
    for number, shape in enumerate(SHAPES):
        chosen = (number + (0 if dtype == torch.float32 else 2)) % len(OPTIONS)
        batch, length = [(3, 7), (1, 9), (2, 5), (2, 1)][chosen]
        options = OPTIONS[chosen]
        method = at_work(name, shape, length, dtype, options)
        batches = tokens(shape, batch, length)
        kept = memory.kept_by(lambda m=method, b=batches: m.loss(b), method.model)
        found = expected(shape, batch, length, dtype, name, options)
        assert (found.saved, found.unseen) == (kept.saved, kept.unseen), (shape.name, options)
        assert found.trained == method.trained_parameters()


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OF_TORCH)
def test_flops_are_those_that_torch_counts(name, checkpointing):
    shape, options = SHAPES[1], Options(checkpointing=checkpointing)
    method = at_work(name, shape, 7, torch.float32, options)
    with FlopCounterMode(display=False, custom_mapping=work.FORMULAS) as counter:
        method.loss(tokens(shape, 3, 7)).backward()
    assert expected(shape, 3, 7, torch.float32, name, options).flops == counter.get_total_flops()


def test_attention_is_counted_at_and_below_the_diagonal():
    def of_attention(length):
        """2 products in the forward and 5 in the backward, of T (T + 1) / 2 scores each."""
        scores = GROUPED.layers * 3 * GROUPED.heads * length * (length + 1) // 2
        return 7 * 2 * scores * GROUPED.head_dim

    flops = {n: expected(GROUPED, 3, n, torch.float32, "frozen").flops for n in (7, 14)}
    dense = {n: flops[n] - of_attention(n) for n in flops}
    assert dense[14] == 2 * dense[7] > 0  # the rest is linear in the tokens


@pytest.mark.slow
def test_two_depths_tell_of_all(name):
    shape = replace(GROUPED, layers=6, of_layers=6)
    found = predict(Case((), shape, 3, 37, "float32", name), BUDGET)
    whole = counted(Case((), shape, 3, 37, "float32", name), BUDGET, "cuda")
    for quantity in ("trained", "flops", "saved", "unseen"):
        assert getattr(found, quantity) == getattr(whole, quantity), quantity
    # of S2FT's channels some are neighbours, not in every layer as many
    rel = 0.01 if name.startswith("s2ft") else 1e-9
    assert found.bytes == pytest.approx(whole.bytes, rel=rel)
    for gpu in work.GPUS.values():
        assert found.seconds(gpu) == pytest.approx(whole.seconds(gpu), rel=rel)
    # LISA's depends on which layers were drawn
    assert found.peak == pytest.approx(whole.peak, rel=0.01 if name == "lisa" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["frozen", "full", "lora", "lora_fused", "spiel_ma"])
def test_the_peak_is_near_what_the_allocator_reports(name, checkpointing):
    shape, options, made = TABLE["toy"], Options(checkpointing=checkpointing), []
    budget, batch = comparable(shape.config(37)), tokens(shape, 3, 37)

    def construct():
        made.append(METHODS[name](shape.build(37, torch.float32, "cpu"), budget, 1e-3, options))

    _, _, *peaks = memory.peaks(
        [construct, *[lambda: made[0].step(batch)] * 3], torch.device("cpu")
    )
    found = predict(Case((), shape, 3, 37, "float32", name, options), budget, "cpu")
    assert max(peaks) == pytest.approx(found.peak, rel=0.01)


def test_a_kernel_of_a_gpu_is_one_kernel():
    """d_delta reads its operands in bf16 and adds to fp32, where plain torch casts both first."""
    size = (GROUPED, 3, 7, torch.bfloat16, "s2ft_unfused")
    m, n, r = 21, GROUPED.hidden, BUDGET.channels
    kernel = (2 * m * n * r, 2 * m * (n + r) + 4 * n * r, "bfloat16")
    assert expected(*size, device="cuda").kernels[kernel] == GROUPED.layers
    assert expected(*size, device="cpu").kernels[kernel] == 0
    fused = expected(GROUPED, 3, 7, torch.bfloat16, "s2ft_inplace", device="cuda")
    assert fused.bytes < expected(*size, device="cuda").bytes


def test_scattered_columns_are_written_by_the_sector():
    """A sector has 16 numbers of bf16: a run of them is written, a part of them read first."""
    weight = torch.empty(10, 64, dtype=torch.bfloat16)

    def moved(index):
        r = len(range(64)[index]) if isinstance(index, slice) else len(index)
        base, delta = weight[:, :r].clone(), torch.zeros(10, r)
        return work.slice_write([weight], [base], [delta], [index], ["in"]).bytes - 10 * r * 6

    run = torch.arange(16, 32, dtype=torch.int32)
    assert moved(slice(16, 32)) == moved(run) == 10 * 32
    assert moved(run - 1) == 10 * 4 * 32
    assert moved(torch.tensor([0, 1, 17, 40, 63])) == 10 * 8 * 32


def test_every_op_of_the_reference_has_its_work():
    assert not work.POINTWISE - work.OPS.keys()
    for name, op in work.OPS.items():
        given = list(inspect.signature(op).parameters)
        assert given == list(inspect.signature(getattr(reference, name)).parameters), name
    public = {name for name in vars(reference) if not name.startswith("_")}
    ops = {name for name in public if inspect.isfunction(getattr(reference, name))}
    helpers = {"like_tokens", "slice_writer", "take"}  # the ops' own, and the host's
    serving = {"tile_plan", "grouped_in_", "grouped_out_"}  # not in a training step
    assert ops - work.OPS.keys() == helpers | serving


def test_nothing_is_computed_and_no_memory_touched():
    shape = TABLE["llama-3-70b"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = predict(Case((), shape, 1, 4096, "bfloat16", "full"), comparable(shape.config(4096)))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert found.peak > 4 * 2 * shape.parameters()
    assert grown * 2**10 < 2 * shape.parameters() / 500


def test_what_is_freed_is_alive_no_longer():
    with dry_run("cpu") as run:
        x = torch.randn(2**20)
        y = x + 1
        assert run.alive == 2 * 4 * 2**20
        del x
        assert run.alive == y.untyped_storage().nbytes() == 4 * 2**20
        assert run.peaks == {"building": 2 * 4 * 2**20}


@pytest.mark.slow
def test_the_command_prints_a_row_for_every_method(capsys):
    pytest.importorskip("galore_torch")
    assert main(["--model", "toy", "--tokens", "32", "--rank", "4", "--ceiling", "100", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "predictions" in printed[0] and "not measured" in printed[-1]
    lines = [line.split() for line in printed[3 : 3 + len(METHODS)]]  # below the head and its rule
    assert [line[0] for line in lines] == list(METHODS)
    budget = comparable(TABLE["toy"].config(32), rank=4)
    floor, lora = (
        predict(Case((), TABLE["toy"], 1, 32, "bfloat16", name), budget)
        for name in ("frozen", "lora")
    )
    seconds, of_floor = (each.seconds(work.GPUS["H200"]) for each in (lora, floor))
    assert lines[list(METHODS).index("lora")][1:8] == [
        *(f"{lora.trained / 1e6:.2f}", f"{lora.flops / 1e12:.2f}", f"{lora.bytes / 1e9:.1f}"),
        *(f"{lora.saved / 2**30:.2f}", f"{lora.peak / 2**30:.2f}"),
        *(f"{seconds * 1e3:.1f}", f"{seconds / of_floor:.3f}"),
    ]


def test_a_product_is_bound_by_its_flops_and_a_copy_by_its_bytes():
    h200 = work.GPUS["H200"]
    assert h200.seconds(790 * 10**12, 1, "bfloat16") == pytest.approx(1)
    assert h200.seconds(1, 43 * 10**11, "int64") == pytest.approx(1)
    assert h200.seconds(67 * 10**12, 1, "float32") == pytest.approx(1)
