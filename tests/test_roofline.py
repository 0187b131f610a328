"""The model of a step: exact where it says so, against what torch keeps, runs and counts."""

from dataclasses import replace

import pytest
import torch
import triton.language as tl
from test_fast_ops import Interpreted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench import memory
from bench.activations import walk
from bench.methods import METHODS, Budget, Options, comparable
from bench.methods.galore import GaLore
from bench.roofline import floor, predict
from bench.steps.model_shapes import TABLE, Shape
from s2kernels import fast_ops

# Widths that divide nothing, grouped heads whose widths do not add up to the hidden size, qwen's
# norms of heads and biases, an embedding that is the head too.
GROUPED = Shape("grouped", "llama", 48, 104, 2, 6, 2, 16, 97, 2, 97)
SHAPES = [
    GROUPED,
    replace(GROUPED, name="qwen3", model_type="qwen3", kv_heads=3, tied=True),
    replace(GROUPED, name="qwen2", model_type="qwen2", layers=1, of_layers=1, heads=5, kv_heads=5),
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
CEILINGS = {
    "gemm_flops": {"float32": 5e13, "bfloat16": 8e14},
    "copy_bytes_per_second": 4e12,
}


S2FT = ("s2ft_inplace", "s2ft_unfused", "s2ft_additive")
# Of which not every kernel is modelled.
ESTIMATED = ("loreft", "shira", "spiel", "spiel_ma")


class GaLoreByDescent(GaLore):
    """GaLore without its package, of which forward and backward know nothing."""

    @classmethod
    def check(cls, device, options):
        options.check(device)

    def make_optimizer(self, lr):
        return torch.optim.SGD(self.trained(), lr)


def at_work(name, shape, length, dtype, options=OPTIONS[0]):
    """The method after a first step, in which some make what they hold from then on."""
    method = GaLoreByDescent if name == "galore" else METHODS[name]
    running = method(shape.build(length, dtype, "cpu"), BUDGET, 1e-3, options)
    running.step(torch.zeros(1, length, dtype=torch.int64))
    running.zero_grad()
    return running


def tokens(shape, batch, length):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocab, (batch, length), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_kept_is_exact(name, dtype):
    # Both dtypes together take every shape through all of the options.
    offset = 0 if dtype == torch.float32 else 2
    cases = [(i, (i + j + offset) % len(OPTIONS)) for i in range(len(SHAPES)) for j in (0, 1)]
    for number, chosen in cases:
        shape, options = SHAPES[number], OPTIONS[chosen]
        batch, length = [(3, 7), (1, 9), (2, 5), (2, 1)][chosen]
        method, batches = at_work(name, shape, length, dtype, options), tokens(shape, batch, length)
        kept = memory.kept_by(lambda m=method, b=batches: m.loss(b), method.model)
        book = walk(shape, batch, length, dtype.itemsize, name, BUDGET, options)
        assert (book.saved_bytes(), book.unseen_bytes()) == (kept.saved, kept.unseen), (
            f"{shape.name}, {options}, {batch} x {length}"
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="liger-kernel is interpreted here")
@pytest.mark.parametrize("name", ["frozen", "full", "lora", "s2ft_inplace"])
def test_what_ligers_operators_keep_is_exact(name, monkeypatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(Options, "check", lambda self, device: None)
    monkeypatch.setattr(fast_ops, "_not_on_cuda", lambda model: None)
    monkeypatch.setattr(fast_ops, "_NORM_OF_LLAMA", (Interpreted(0.0), "llama"))
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: tl.rsqrt(x))
    shape, options = SHAPES[1], Options(liger=True)  # of which the heads have norms, too
    model = shape.build(5, torch.float32, "cpu")
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = Interpreted(module.variance_epsilon)
    method, batch = METHODS[name](model, BUDGET, 1e-3, options), tokens(shape, 1, 5)
    kept = memory.kept_by(lambda: method.loss(batch), method.model)
    assert walk(shape, 1, 5, 4, name, BUDGET, options).saved_bytes() == kept.saved


# Numbers of a token and layer: fused, the slice of h is made anew, and silu(gate) is not kept.
@pytest.mark.parametrize(
    ("name", "of_slices", "of_swiglu"),
    [("s2ft_unfused", 16 + 7, 3 * 104), ("s2ft_inplace", 16, 2 * 104)],
)
def test_what_is_kept_is_named(name, of_slices, of_swiglu):
    book = walk(GROUPED, 3, 7, 4, name, BUDGET, Options(full_depth=True))
    parts = book.saved_by_part()
    assert sum(parts.values()) == book.saved_bytes()
    assert parts["slice"] == 2 * 21 * of_slices * 4  # layers * M * numbers * itemsize
    assert parts["swiglu"] == 2 * 21 * of_swiglu * 4


def test_a_fused_layer_keeps_as_little_as_its_operators_need():
    """LLaMA-2-7B in bf16, liger-kernel's norms, RoPE and loss: bytes of one token and layer."""
    shape, budget = TABLE["llama-2-7b"].cut(3), Budget(heads=2, channels=256, rank=16, seed=0)

    def of_layer(name):
        book = walk(shape, 1, 64, 2, name, budget, Options(liger=True))
        return (book.marks[3][0] - book.marks[2][0]) / 64

    # x of two norms, q, k, v and what attention gives; gate and up; the logsumexp of 32 heads and
    # 1 / rms in fp32; the trained channels of o_proj: 91.6 KiB. Those of h would make it 92.1.
    needed = 2 * (6 * 4096 + 2 * 11008) + 4 * (32 + 2) + 2 * 256
    assert of_layer("s2ft_inplace") == needed == 93_832
    assert (needed + 2 * 256) / 2**10 == pytest.approx(92.1, abs=0.05)
    assert of_layer("frozen") == needed - 2 * 256 + 2 * 11008  # and silu(gate)
    assert of_layer("s2ft_unfused") == of_layer("frozen") + 2 * 2 * 256
    # x of the FFN's three products and of q, k, v, h, and x A of rank 16 of all seven
    assert of_layer("lora") == of_layer("frozen") + 2 * (2 * 4096 + 11008 + 7 * 16)


class Operators(TorchDispatchMode):
    """The bytes of every operator that is no view: its operands and results, once each."""

    def __init__(self, hidden):
        super().__init__()
        self.pointwise, self.products, self.attention = [], [], []
        self._hidden, self._is_counting = hidden, True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # What an operator is given to write its result to, it does not read.
        given = args, {key: x for key, x in kwargs.items() if key not in ("out", "grad_input")}
        operands = {id(x): x for x in tree_leaves(given) if isinstance(x, torch.Tensor)}
        operands = list(operands.values())
        results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage()._cdata for x in tensors}
        is_view = all(x.untyped_storage()._cdata in known for x in results)
        name = func.overloadpacket.__name__
        # Positions, the mask and the rotary angles, made once a forward, are no part of the model.
        if name == "arange":
            self._is_counting = False
        elif not self._is_counting:
            self._is_counting = any(x.dim() == 3 and x.shape[-1] == self._hidden for x in operands)
        skipped = name in ("empty", "empty_like", "new_empty", "empty_strided", "ones_like")
        if (is_view and not func._schema.is_mutable) or skipped or not self._is_counting:
            return result
        nbytes = sum(map(size, operands)) + sum(map(size, results))
        if name == "embedding":  # reads only the rows that it takes
            nbytes = size(operands[1]) + 2 * size(results[0])
        elif name == "embedding_dense_backward":
            nbytes = 2 * size(operands[0]) + size(operands[1]) + size(results[0])
        elif name == "nll_loss_forward":
            nbytes = 12 * operands[1].numel()
        elif name == "nll_loss_backward":
            nbytes = size(results[0]) + size(operands[2])
        elif name == "copy_":
            nbytes = size(operands[1]) + size(results[0])
        elif kwargs.get("beta") == 0:  # written, but not read
            nbytes -= size(results[0])
        if "scaled_dot" in name:
            self.attention.append(nbytes)
        elif name in ("mm", "addmm", "addmm_"):
            self.products.append(nbytes)
        else:
            self.pointwise.append(nbytes)
        return result


def size(x):
    """Bytes of x, of an expanded one those that are there."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ESTIMATED])
def test_kernels_are_those_that_torch_runs(name, dtype):
    for number, chosen in [(0, 0), (0, 3), (1, 1), (1, 2), (2, 0)]:
        shape, options = SHAPES[number], OPTIONS[chosen]
        method, batch = at_work(name, shape, 7, dtype, options), tokens(shape, 3, 7)
        with Operators(shape.hidden) as forward:
            loss = method.loss(batch)
        with Operators(shape.hidden) as backward:
            method.backward(loss)
        book = walk(shape, 3, 7, dtype.itemsize, name, BUDGET, options)
        for counted, kernels in ((forward, book.forward), (backward, book.backward)):
            for kind, expected in (
                ("gemm", counted.products),
                ("attention", counted.attention),
                ("pointwise", counted.pointwise),
            ):
                found = [kernel.nbytes for kernel in kernels if kernel.kind == kind]
                assert sorted(found) == sorted(expected), f"{shape.name}, {options}, {kind}"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["frozen", "full", "lora", "dora", "s2ft_unfused"])
def test_flops_of_products_are_those_of_the_flop_counter(name, checkpointing):
    options = Options(checkpointing=checkpointing)
    method = at_work(name, SHAPES[1], 7, torch.float32, options)
    with FlopCounterMode(display=False) as counter:
        method.backward(method.loss(tokens(SHAPES[1], 3, 7)))
    counts = counter.get_flop_counts()["Global"]
    expected = counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)
    book = walk(SHAPES[1], 3, 7, 4, name, BUDGET, options)
    assert sum(k.flops for k in (*book.forward, *book.backward) if k.kind == "gemm") == expected


@pytest.mark.parametrize("name", METHODS)
def test_what_lies_between_steps_is_exact(name):
    method = at_work(name, GROUPED, 7, torch.bfloat16)
    method.step(tokens(GROUPED, 3, 7))
    found = predict(GROUPED, 3, 7, "bfloat16", name, BUDGET, Options(), CEILINGS).bytes_parts
    assert found["weights"] == memory.total_bytes(memory.model_tensors(method.model))
    assert found["gradients"] == memory.total_bytes(memory.gradients(method.model))
    if name != "galore":
        assert found["optimizer"] == memory.total_bytes(method.state_tensors())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "name",
    [*("frozen", "full", "lora", "lora_fused"), *S2FT, *("spiel", "spiel_ma")],
)
def test_the_peak_is_near_what_the_allocator_reports(name, checkpointing):
    shape, options, made = TABLE["toy"], Options(checkpointing=checkpointing), []
    batch = tokens(shape, 3, 37)

    def construct():
        model = shape.build(37, torch.float32, "cpu")
        made.append(METHODS[name](model, comparable(shape.config(37)), 1e-3, options))

    _, _, *peaks = memory.peaks(
        [construct, *[lambda: made[0].step(batch)] * 3], torch.device("cpu")
    )
    found = predict(shape, 3, 37, "float32", name, comparable(shape.config(37)), options, CEILINGS)
    assert max(peaks) == pytest.approx(found.peak, rel=0.1 if checkpointing else 0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_galore_holds_is_exact(dtype):
    """In fp32 a projection is a view, which keeps all singular vectors alive."""
    pytest.importorskip("galore_torch")
    made, batch = [], tokens(GROUPED, 3, 7)

    def construct():
        model = GROUPED.build(7, getattr(torch, dtype), "cpu")
        made.append(GaLore(model, BUDGET, 1e-3))

    _, _, *peaks = memory.peaks(
        [construct, *[lambda: made[0].step(batch)] * 3], torch.device("cpu")
    )
    found = predict(GROUPED, 3, 7, dtype, "galore", BUDGET, Options(), CEILINGS)
    assert found.bytes_parts["optimizer"] == memory.total_bytes(made[0].state_tensors())
    if dtype == "float32":  # products in bf16 take more, on a CPU
        assert max(peaks) == pytest.approx(found.peak, rel=0.001)


# of an entry; SM3's 32 are of one layer alone, here of the largest
@pytest.mark.parametrize(
    ("name", "each"), [("spiel", 64), ("spiel_ma", 22 + 32 * 176 * 64 / 92160)]
)
def test_spiel_takes_so_many_bytes_an_entry(name, each):
    shape, batch, found = TABLE["toy"], tokens(TABLE["toy"], 1, 8), {}
    for density in (0.001, 0.01, 0.1, 0.5):
        budget, made = comparable(shape.config(8), share=density), []

        def construct(budget=budget, made=made):
            made.append(METHODS[name](shape.build(8, torch.float32, "cpu"), budget, 1e-3))

        steps = [lambda made=made: made[0].step(batch)] * 3
        _, _, *peaks = memory.peaks([construct, *steps], torch.device("cpu"))
        expected = predict(shape, 1, 8, "float32", name, budget, Options(), CEILINGS)
        assert max(peaks) == pytest.approx(expected.peak, rel=0.02)
        found[made[0].trained_parameters()] = max(peaks)
    *_, (few, low), (many, high) = found.items()
    assert (high - low) / (many - few) == pytest.approx(each, rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["llama-2-7b", "llama-2-13b", "llama-3-8b", "qwen3-8b"])
def test_s2ft_costs_less_than_lora_and_lora_less_than_full(model, dtype):
    shape = TABLE[model]
    budget = comparable(shape.config(1024))
    for options in OPTIONS:
        found = {
            name: predict(shape, 1, 1024, dtype, name, budget, options, CEILINGS, "cuda")
            for name in ("frozen", *S2FT, "lora", "lora_fp32", "full")
        }
        # With checkpoints little is saved, and S2FT's fp32 states weigh more than LoRA's in bf16.
        for quantity in ("seconds",) if options.checkpointing else ("seconds", "peak"):
            values = {name: getattr(each, quantity) for name, each in found.items()}
            assert max(values[name] for name in S2FT) < values["lora"]
            assert values["lora"] < values["full"]
            assert values["lora"] <= values["lora_fp32"]
            if options.full_depth:
                assert values["s2ft_inplace"] < values["s2ft_unfused"]
                assert values["frozen"] < values["s2ft_unfused"]
        if not options.checkpointing:
            assert found["s2ft_inplace"].saved < found["lora"].saved < found["full"].saved


@pytest.mark.parametrize("name", ["frozen", "full", "lora", "s2ft_inplace"])
def test_every_layer_but_the_first_adds_the_same(name):
    shape = TABLE["llama-2-7b"]
    budget, size = comparable(shape.config(512)), (1, 512, "bfloat16", name)
    first, second, third, last = (
        predict(shape.cut(k), *size, budget, Options(), CEILINGS) for k in (1, 2, 3, 32)
    )
    assert last.saved == second.saved + 30 * (third.saved - second.saved)
    assert last.seconds == pytest.approx(second.seconds + 30 * (third.seconds - second.seconds))
    # so that cuts of one and two layers tell of all
    assert last.saved == pytest.approx(first.saved + 31 * (second.saved - first.saved), rel=0.01)


def test_seconds_are_flops_or_bytes_at_the_ceilings():
    def seconds(flops, rate):
        ceilings = {"gemm_flops": {"float32": flops}, "copy_bytes_per_second": rate}
        return predict(GROUPED, 3, 7, "float32", "full", BUDGET, Options(), ceilings)

    by_bytes, by_flops = seconds(1e30, 1e9), seconds(1e6, 1e30)
    book = walk(GROUPED, 3, 7, 4, "full", BUDGET, Options())
    moved = sum(kernel.nbytes for kernel in (*book.forward, *book.backward))
    assert by_bytes.seconds == pytest.approx((moved + 7 * GROUPED.parameters() * 4) / 1e9)
    assert by_bytes.seconds_parts["optimizer"] == pytest.approx(7 * GROUPED.parameters() * 4 / 1e9)
    assert by_flops.seconds == pytest.approx(by_flops.flops / 1e6)
    for found in (by_bytes, by_flops):
        assert sum(found.seconds_parts.values()) == pytest.approx(found.seconds)
        assert sum(found.seconds_by_part.values()) == pytest.approx(found.seconds)
    assert seconds(1e6, 1e9).seconds > max(by_bytes.seconds, by_flops.seconds)


def test_the_floor_is_the_frozen_method():
    found = floor(GROUPED, 3, 7, "float32", Options(), CEILINGS)
    assert found == predict(GROUPED, 3, 7, "float32", "frozen", BUDGET, Options(), CEILINGS)
    assert found.seconds_parts["optimizer"] == 0


def test_a_prediction_says_what_it_leaves_out():
    def fits(method="lora", device="cpu", dtype="bfloat16", **options):
        shape, budget = TABLE["llama-3-8b"], comparable(TABLE["llama-3-8b"].config(4096))
        args = (shape, 2, 4096, dtype, method, budget, Options(**options), CEILINGS, device)
        return predict(*args).fits

    assert fits() is None
    assert fits(attention="flash", checkpointing=True, full_depth=True) is None
    assert "weights of the attention" in fits(attention="eager")
    assert "torch.compile" in fits(compile=True)
    assert "liger-kernel makes the logits" in fits(liger=True)
    assert "not checked" in fits(device="cuda")
    assert "math kernel" in fits(device="cuda", dtype="float32")
    assert "singular value" in fits("galore")
    assert "orthogonal" in fits("loreft")
    assert "watching gradients" in fits("spiel")
    assert "replacing entries" in fits("spiel_ma") and "watching" not in fits("spiel_ma")
    tiny = predict(GROUPED, 3, 7, "float32", "lora", BUDGET, Options(), CEILINGS)
    assert "launches alone" in tiny.fits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "dtype must be one of .*got 'float64'"),
        ({"method": "adapter"}, "method must be one of .*got 'adapter'"),
        ({"device": "mps"}, "device must be one of .*got 'mps'"),
        ({"dtype": "float16"}, "gemm_flops.*must have 'float16'"),
    ],
)
def test_what_is_not_known_is_refused(change, message):
    given = {"dtype": "float32", "method": "lora", "device": "cpu"} | change
    with pytest.raises(ValueError, match=message):
        predict(
            GROUPED,
            3,
            7,
            given["dtype"],
            given["method"],
            BUDGET,
            Options(),
            CEILINGS,
            given["device"],
        )
