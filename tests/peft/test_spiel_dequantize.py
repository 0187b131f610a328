"""Quantized weights made dense a panel at a time: the same bits, and never more than a panel."""

import pytest
import torch
from peft import get_peft_model
from peft.utils.integrations import dequantize_module_weight
from test_spiel_tuner import Largest
from torch import nn

from s2kernels.autograd import panels
from s2kernels.peft import SpIELConfig
from s2kernels.peft.spiel.dequantize import panels_of

# (N, K): whole blocks of 256 in a row, of 64, and none
SHAPES = ((51, 512), (70, 192), (96, 96))


def nf4(linear, **options):
    bnb = pytest.importorskip("bitsandbytes")
    options = dict(quant_type="nf4", compress_statistics=False) | options
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32
    )
    made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **options)
    return made.to("cpu")


def int8(linear):
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
    )
    made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def torchao(linear, name, **options):
    quantization = pytest.importorskip("torchao.quantization")
    config = getattr(quantization, name)(**options)
    holder = nn.Sequential(linear)
    quantization.quantize_(holder, config)
    return holder[0].requires_grad_(False)


def granularity(name, *args):
    return getattr(pytest.importorskip("torchao.quantization"), name)(*args)


KINDS = {
    "nf4": nf4,
    "nf4 double": lambda linear: nf4(linear, compress_statistics=True),
    "nf4 in bf16 storage": lambda linear: nf4(linear, quant_storage=torch.bfloat16),
    "nf4 in blocks of 256": lambda linear: nf4(linear, blocksize=256, compress_statistics=True),
    "fp4": lambda linear: nf4(linear, quant_type="fp4"),
    "int8": int8,
    "torchao int8": lambda linear: torchao(linear, "Int8WeightOnlyConfig"),
    "torchao int8 dynamic": lambda linear: torchao(linear, "Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": lambda linear: torchao(linear, "Float8WeightOnlyConfig"),
    "torchao int8 per tensor": lambda linear: torchao(
        linear, "Int8WeightOnlyConfig", granularity=granularity("PerTensor")
    ),
    "torchao int8 in groups": lambda linear: torchao(
        linear, "Int8WeightOnlyConfig", granularity=granularity("PerGroup", 32)
    ),
    "torchao intx": lambda linear: torchao(linear, "IntxWeightOnlyConfig"),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def layer(kind, shape, dtype=torch.float32):
    torch.manual_seed(3)
    return KINDS[kind](nn.Linear(shape[1], shape[0], bias=False, dtype=dtype))


@EVERY_KIND
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_panels_are_the_dequantized_weight_bit_for_bit(kind, shape, dtype, monkeypatch):
    quantized = layer(kind, shape, dtype)
    want = dequantize_module_weight(quantized).clone()
    made = panels_of(quantized)
    blocksize = getattr(getattr(quantized.weight, "quant_state", None), "blocksize", 1)
    assert made.shape == shape and made.step == (shape[0] if shape[1] % blocksize else 1)
    monkeypatch.setattr(panels, "WORKSPACE", 20 * shape[1])
    where = panels.bounds(shape, made.step)
    for start, stop in zip(where, where[1:], strict=False):
        rows = made.rows(start, stop)
        assert rows.dtype == want.dtype
        assert torch.equal(rows, want[start:stop]), (start, stop)
    assert torch.equal(made.rows(0, shape[0]), want)
    first = made.rows(0, made.step)
    first.zero_()  # a tensor of its own
    assert torch.equal(made.rows(0, made.step), want[: made.step])


@EVERY_KIND
def test_no_dense_weight_is_made_in_a_step(kind, monkeypatch):
    """Panels, strips of the gradient, entries and activations; and the result is that of one panel.

    The weight of a single panel is made as a whole, which shows that it would have been seen.
    """
    N, K, tokens, k = 300, 512, 6, 500
    x = torch.randn(2, tokens // 2, K, generator=torch.Generator().manual_seed(4))
    results = {}
    for workspace in (N * K, N * K // 16):
        monkeypatch.setattr(panels, "WORKSPACE", workspace)
        model = nn.Sequential(layer(kind, (N, K)))
        model = get_peft_model(model, SpIELConfig(num_tunable_weights=k, target_modules=["0"]))
        delta = next(p for name, p in model.named_parameters() if "spiel_delta" in name)
        with torch.no_grad():
            delta.copy_(torch.randn(k, generator=torch.Generator().manual_seed(5)))
        x.grad = None
        x.requires_grad_()
        model(x)  # plans, and what a first forward moves, are not counted
        with Largest() as largest:
            y = model(x)
            y.square().sum().backward()
        results[workspace] = y.detach(), x.grad, delta.grad
        if workspace < N * K:
            assert largest.numel <= workspace + 2 * k + tokens * N < N * K // 6
        else:
            assert largest.numel == N * K
    for got, want in zip(*results.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@EVERY_KIND
@pytest.mark.parametrize("shape", SHAPES[::2])
def test_a_backward_reads_the_weight_that_its_forward_read(kind, shape):
    """Where another one was assigned since; and neither replaces the layer's weight itself."""
    model = nn.Sequential(layer(kind, shape))
    model = get_peft_model(model, SpIELConfig(num_tunable_weights=50, target_modules=["0"]))
    base = model.base_model.model[0].get_base_layer()
    weight = base.weight
    x = torch.randn(3, shape[1], requires_grad=True)
    want = torch.autograd.grad(model(x).square().sum(), x)
    loss = model(x).square().sum()
    assert base.weight is weight
    other = KINDS[kind](nn.Linear(shape[1], shape[0], bias=False))
    base.weight = other.weight
    with torch.no_grad():
        model(x)
    assert torch.equal(torch.autograd.grad(loss, x)[0], want[0])


def test_scales_are_those_of_an_int8_weight_that_was_assigned_later():
    """A forward moves the scales from the weight to the layer; a new weight brings its own."""
    base, other = layer("int8", (51, 512)), int8(nn.Linear(512, 51, bias=False))
    base(torch.zeros(1, 512))
    base.weight = other.weight
    assert torch.equal(panels_of(base).rows(0, 51), panels_of(other).rows(0, 51))


@pytest.mark.parametrize("kind", ("nf4", "int8", "int8 with fp16 weights"))
def test_a_weight_that_is_not_quantized_is_refused(kind):
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "nf4":
        base = bnb.nn.Linear4bit(64, 8)
    else:
        base = bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=kind != "int8")
    with pytest.raises(ValueError, match="bitsandbytes has not quantized the weight"):
        panels_of(base)


@pytest.mark.parametrize("nested", (False, True))
def test_a_forward_for_inference_does_not_rearrange_the_weight(nested):
    """bitsandbytes does that on CPUs with AVX512-BF16, where the adapter is disabled."""
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nf4(nn.Linear(128, 64), compress_statistics=nested))
    model = get_peft_model(model, SpIELConfig(num_tunable_weights=100, target_modules=["0"]))
    base = model.base_model.model[0].base_layer
    base.support_avx512bf16_for_cpu = True  # as on such a CPU
    x, before = torch.randn(4, 128), dequantize_module_weight(base).clone()
    model.eval()
    with torch.no_grad():
        want = model(x)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), x @ before.T)
        assert torch.equal(dequantize_module_weight(base), before)
        assert torch.equal(model(x), want)
        assert base.support_avx512bf16_for_cpu

    packed = nf4(nn.Linear(128, 64), compress_statistics=nested)
    packed.weight.data, packed.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        packed.weight.data, packed.weight.quant_state
    )
    model = nn.Sequential(packed)
    with pytest.raises(ValueError, match="bitsandbytes has rearranged the 4-bit weight"):
        get_peft_model(model, SpIELConfig(num_tunable_weights=100, target_modules=["0"]))
    assert model[0] is packed
