"""A LoRA that is a slice becomes S2FT, bit for bit; every other one is refused."""

import pytest
import torch
from lora_cases import ALL, WIDE, dense, s2ft_model
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, token_ids

from s2kernels.adapter import (
    CONFIG_NAME,
    TENSORS_NAME,
    Slice,
    read_adapter,
    read_files,
    write_adapter,
    write_files,
)
from s2kernels.lora import export_lora, import_lora


@pytest.mark.parametrize("format", ("peft", "vllm", "sglang"))
@pytest.mark.parametrize("targets", (None, ["v_proj", "up_proj", "down_proj"], ALL))
def test_export_and_import_give_back_every_bit(targets, format, tmp_path):
    model = s2ft_model(targets)
    model.save_pretrained(tmp_path / "s2ft")
    want = read_adapter(tmp_path / "s2ft")
    name = "model.layers.1.mlp.down_proj"  # channels in any order; one that was never moved
    part = want[name]
    want[name] = Slice(part.dim, part.index.flip(0), part.delta.flip(1).contiguous())
    want[name].delta[:, 4] = 0
    write_adapter(tmp_path / "s2ft", want, read_files(tmp_path / "s2ft")[0])

    base = model.get_base_model()
    lora = export_lora(tmp_path / "s2ft", tmp_path / "lora", format=format, base=base)
    back = import_lora(lora, tmp_path / "back")
    got = read_adapter(back)
    assert got.keys() == want.keys()
    for name, part in want.items():
        assert got[name].dim == part.dim
        assert torch.equal(got[name].index, part.index)
        assert torch.equal(got[name].delta, part.delta) and got[name].delta.dtype == torch.float32
    config = read_files(back)[0]
    assert config["indices"] == {name: part.index.tolist() for name, part in want.items()}
    assert config["target_modules"] == sorted(want)


def test_an_imported_adapter_loads_and_computes_the_same(tmp_path):
    model = s2ft_model(ALL)
    want = model(token_ids()).logits
    back = import_lora(export_lora(model, tmp_path / "lora", format="vllm"), tmp_path / "back")
    config = PeftConfig.from_pretrained(back)
    config.mode, config.layout = "additive", "gather"
    loaded = PeftModel.from_pretrained(
        tiny_model("llama", torch.float32, **WIDE), back, config=config
    )
    assert (loaded(token_ids()).logits - want).abs().max() <= 1e-6


def lora_folder(path, factors, **fields):
    tensors = {}
    for name, (lora_a, lora_b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b
    write_files(path, {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | fields, tensors)
    return path


A = torch.tensor([[0.0, 1, 0], [1, 0, 0]])
B = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
SCALED = [
    (dict(lora_alpha=8), 4.0),
    (dict(lora_alpha=8, use_rslora=True), 8 / 2**0.5),
    (dict(alpha_pattern={"x.o_proj": 1}), 0.5),
    (dict(alpha_pattern={"layer.*o_proj": 6, "q_proj": 5}), 3.0),
]


@pytest.mark.parametrize(("fields", "scaling"), SCALED)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_import_folds_scaling_in(fields, scaling, dtype, tmp_path):
    name = "layers.0.x.o_proj"
    path = lora_folder(tmp_path / "lora", {name: (A.to(dtype), B.to(dtype))}, **fields)
    part = read_adapter(import_lora(path, tmp_path / "s2ft"))[name]
    assert part.dim == "in" and part.index.tolist() == [1, 0]
    assert part.delta.dtype == torch.float32 and torch.equal(part.delta, B * scaling)


def test_import_takes_what_peft_itself_trained_with_a_selector(tmp_path):
    """LoRA whose A was set to a selection and frozen: S2FT by other means."""
    base = tiny_model("llama", torch.float32, **WIDE)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["down_proj"], layers_to_transform=[0])
    model = get_peft_model(base, config)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()
        layer.lora_A["default"].weight[[0, 1, 2], [70, 5, 191]] = 1
        layer.lora_B["default"].weight.normal_()
    model.save_pretrained(tmp_path / "lora")
    slices = read_adapter(import_lora(tmp_path / "lora", tmp_path / "s2ft"))
    assert list(slices) == ["model.layers.0.mlp.down_proj"]
    part = slices["model.layers.0.mlp.down_proj"]
    assert part.index.tolist() == [70, 5, 191]
    assert torch.equal(part.delta, 2 * layer.lora_B["default"].weight)


@pytest.mark.parametrize("dim", ("in", "out"))
def test_import_drops_padding_wherever_it_is(dim, tmp_path):
    selector = torch.zeros(4, 3)
    selector[1], selector[3] = A[0], A[1]
    delta = torch.randn(5, 4)  # what meets a zero of the selector counts for nothing
    factors = (selector, delta) if dim == "in" else (delta.t(), selector.t())
    path = lora_folder(tmp_path / "lora", {"x": factors, "y": (A, 0 * B), "z": (0 * A, B)}, r=4)
    slices = read_adapter(import_lora(path, tmp_path / "s2ft"))
    part = slices["x"]
    assert part.dim == dim and part.index.tolist() == [1, 0]
    lora_a, lora_b = factors
    want = lora_b @ lora_a * (2 / 4)
    assert torch.equal(dense(part, want.shape), want)
    assert list(slices) == ["x", "y"]  # y trains channels, though they are as they were
    assert not slices["y"].delta.any() and slices["y"].index.tolist() == [1, 0]


REFUSED = {
    "dense": ((A + 1, B), {}, "x: no slice of an S2FT adapter"),
    "two ones": ((torch.tensor([[0.0, 1, 0], [1, 0, 1]]), B), {}, "x: no slice"),
    "not one": ((2 * A, B), {}, "x: no slice"),
    "twice": ((A[[0, 0]], B), {}, "x: index must not repeat a position"),
    "ranks": ((A, B[:, :1]), {}, r"x: .* got \(2, 3\) and \(4, 1\)"),
    "nothing": ((A + 1, 0 * B), {}, "trains nothing"),
    "dora": ((A, B), dict(use_dora=True), "use_dora is True"),
    "lora_bias": ((A, B), dict(lora_bias=True), "lora_bias is True"),
    "bias": ((A, B), dict(bias="all"), "bias is 'all'"),
    "experts": ((A, B), dict(target_parameters=["w"]), r"target_parameters is \['w'\]"),
    "other method": ((A, B), dict(peft_type="VERA"), "holds no LoRA adapter: it is 'VERA'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_import_refuses_what_is_no_slice(case, tmp_path):
    factors, fields, message = REFUSED[case]
    path = lora_folder(tmp_path / "lora", {"x": factors}, **fields)
    with pytest.raises(ValueError, match=message):
        import_lora(path, tmp_path / "s2ft")
    assert not (tmp_path / "s2ft").exists()


def test_import_refuses_tensors_that_it_does_not_know(tmp_path):
    path = lora_folder(tmp_path / "lora", {"x": (A, B)})
    good = load_file(path / TENSORS_NAME)
    save_file(good | {"x.lora_embedding_A": A}, path / TENSORS_NAME)
    with pytest.raises(ValueError, match="it holds x.lora_embedding_A"):
        import_lora(path, tmp_path / "s2ft")
    del good["base_model.model.x.lora_B.weight"]
    save_file(good, path / TENSORS_NAME)
    with pytest.raises(ValueError, match="x: lora_A or lora_B is missing"):
        import_lora(path, tmp_path / "s2ft")
    (path / CONFIG_NAME).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        import_lora(path, tmp_path / "s2ft")
