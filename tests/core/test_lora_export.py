"""S2FT as LoRA: the factors, what stock peft computes from them, and what cannot be exported."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lora_cases import ALL, WIDE, Toy, dense, lora_of, s2ft_model, toy_adapter, toy_slice
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, token_ids
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from s2kernels.adapter import (
    TENSORS_NAME,
    Slice,
    combine,
    read_adapter,
    read_files,
    write_adapter,
    write_files,
)
from s2kernels.lora import export_lora, import_lora
from s2kernels.peft import S2FTConfig

STOCK = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_model, token_ids

report = {}
for folder in json.loads(sys.argv[1]):
    want = load_file(folder + "/logits.safetensors")["logits"]
    base = tiny_model("llama", want.dtype, intermediate_size=192)
    effect = base(token_ids()).logits - want
    difference = PeftModel.from_pretrained(base, folder).eval()(token_ids()).logits - want
    report[folder] = [value.abs().max().item() for value in (difference, effect, want)]
assert not any(name.startswith("s2kernels") for name in sys.modules)
print(json.dumps(report))
"""

COMPUTED = {
    "fp32": (torch.float32, dict()),
    "fp32-inplace": (torch.float32, dict(mode="inplace", layout="permute")),
    "fp64-inplace": (torch.float64, dict(mode="inplace", layout="permute")),
}


@pytest.mark.slow
def test_stock_peft_computes_the_same_on_the_original_base(tmp_path):
    """In a process that never hears of S2FT.

    Sums in the same order give the same bits. A weight that was rounded in place, a permutation and
    padding each round otherwise: then the two are as near as two ways to compute one model are.
    """
    bounds = {}
    for name, (dtype, fields) in COMPUTED.items():
        for targets in (None, ALL):
            model = s2ft_model(targets, dtype, **fields)
            logits = model(token_ids()).logits.detach()
            for format in ("peft", "vllm", "sglang"):
                folder = tmp_path / f"{name}-{'all' if targets else 'o+down'}-{format}"
                export_lora(model, folder, format=format)
                save_file({"logits": logits}, folder / "logits.safetensors")
                bounds[str(folder)] = 32 * torch.finfo(dtype).eps
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", STOCK, json.dumps(list(bounds))],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report.keys() == bounds.keys() and len(bounds) == 18
    for folder, (difference, effect, largest) in report.items():
        name = Path(folder).name
        print(f"{name}: largest logit difference {difference:.1e}, logits to {largest:.1f}")
        assert effect > 0.5 * largest
        assert difference <= bounds[folder] * largest, name
        if name in ("fp32-o+down-peft", "fp32-all-peft"):
            assert difference <= 1e-6, name


def test_the_factors_are_a_selection_and_the_delta(tmp_path):
    model = s2ft_model(ALL)
    model.save_pretrained(tmp_path / "s2ft")
    slices = read_adapter(tmp_path / "s2ft")
    assert sorted({len(part.index) for part in slices.values()}) == [8, 11]
    assert {part.dim for part in slices.values()} == {"in", "out"}
    factors, config = lora_of(export_lora(model, tmp_path / "lora"))
    assert factors.keys() == slices.keys() and len(factors) == 14
    base = model.get_base_model()
    for name, part in slices.items():
        lora_a, lora_b = factors[name]
        layer = base.get_submodule(name)
        assert lora_a.shape == (11, layer.in_features) and lora_b.shape == (layer.out_features, 11)
        assert torch.equal(lora_b @ lora_a, dense(part, (layer.out_features, layer.in_features)))
        selector = lora_a if part.dim == "in" else lora_b.t()
        assert selector.count_nonzero() == selector.sum() == len(part.index)
        assert not lora_a[len(part.index) :].any() and not lora_b[:, len(part.index) :].any()
    assert config["peft_type"] == "LORA" and config["bias"] == "none"
    assert config["r"] == config["lora_alpha"] == 11
    assert config["target_modules"] == sorted(ALL)
    assert "rank_pattern" not in config and "alpha_pattern" not in config
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "lora"), LoraConfig)


def test_a_model_and_its_folder_export_the_same(tmp_path):
    model = s2ft_model(layout="permute")
    model(token_ids())  # the weights are permuted from here on
    model.add_adapter("other", S2FTConfig(heads=1, channels=2))
    model.save_pretrained(tmp_path / "s2ft", selected_adapters=["default"])
    base = tmp_path / "base"
    tiny_model("llama", torch.float32, **WIDE).config.save_pretrained(base)
    config_path = base / "config.json"
    fields = json.loads(config_path.read_text()) | {"architectures": ["LlamaForCausalLM"]}
    config_path.write_text(json.dumps(fields))

    want = load_file(export_lora(model, tmp_path / "a") / TENSORS_NAME)
    for number, given in enumerate((base, str(base), model.get_base_model())):
        out = export_lora(tmp_path / "s2ft", tmp_path / str(number), base=given)
        got = load_file(out / TENSORS_NAME)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)

    config, tensors = read_files(tmp_path / "s2ft")
    write_files(tmp_path / "s2ft", config | {"base_model_name_or_path": str(base)}, tensors)
    out = export_lora(tmp_path / "s2ft", tmp_path / "named")
    assert load_file(out / TENSORS_NAME).keys() == want.keys()
    assert read_files(out)[0]["base_model_name_or_path"] == str(base)

    model.set_adapter("other")
    assert read_files(export_lora(model, tmp_path / "other"))[0]["r"] == 4
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one active adapter wanted"):
        export_lora(model, tmp_path / "both")


def test_targets_are_short_names_only_where_those_mean_the_same(tmp_path):
    """Else stock peft would make LoRA layers where nothing was trained, and miss their weights."""
    model = s2ft_model(layers_to_transform=[1])
    want = model(token_ids()).logits
    out = export_lora(model, tmp_path / "peft")
    assert read_files(out)[0]["target_modules"] == [
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    loaded = PeftModel.from_pretrained(tiny_model("llama", torch.float32, **WIDE), out)
    assert (loaded(token_ids()).logits - want).abs().max() <= 1e-6
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 2
    for format in ("vllm", "sglang"):
        out = export_lora(model, tmp_path / format, format=format)
        assert read_files(out)[0]["target_modules"] == ["down_proj", "o_proj"]


def test_dtype_rounds_the_delta_once(tmp_path):
    model = s2ft_model()
    exact = lora_of(export_lora(model, tmp_path / "fp32"))[0]
    rounded = lora_of(export_lora(model, tmp_path / "bf16", dtype=torch.bfloat16))[0]
    for name, factors in exact.items():
        for got, want in zip(rounded[name], factors, strict=True):
            assert got.dtype == torch.bfloat16 and torch.equal(got, want.to(torch.bfloat16))


@pytest.mark.parametrize("targets", (["down_proj"], ["o_proj", "gate_up_proj", "down_proj"]))
@pytest.mark.parametrize("model_type", ("mixtral", "qwen3_moe"))
def test_slices_of_experts_become_target_parameters(model_type, targets, tmp_path):
    """Of which stock PEFT, that of the LoRA, makes the same logits, to the bit where it adds the
    same numbers in the same order: in the weight.
    """
    ids = token_ids()
    chosen = S2FTConfig(
        heads=2, channels=5, mode="inplace", layout="gather", target_modules=targets
    )
    model = get_peft_model(tiny_model(model_type, torch.float32), chosen).eval()
    with torch.no_grad():
        for name, delta in model.named_parameters():
            if "s2ft_delta" in name:
                delta.normal_(0, 0.3)
        want = model(ids).logits
        plain = tiny_model(model_type, torch.float32)
        assert (plain(ids).logits - want).abs().max() > 0.1
        export_lora(model, tmp_path, rank=20)
        config = LoraConfig.from_pretrained(tmp_path)
        assert any("experts.down_proj" in name for name in config.target_parameters)
        assert (config.r, config.lora_alpha) == (20, 20)
        lora = PeftModel.from_pretrained(plain, tmp_path).eval()
        assert not any("s2ft" in name for name in lora.state_dict())
        assert (lora(ids).logits - want).abs().max() < 1e-5
        merged = lora.merge_and_unload()
        experts = model.base_model.model.model.layers[1].mlp.experts
        inside = model(ids) and experts.base_layer.down_proj
        assert torch.equal(merged.model.layers[1].mlp.experts.down_proj, inside)
    for format in ("vllm", "sglang"):
        with pytest.raises(ValueError, match="down_proj is a tensor of experts: format="):
            export_lora(model, tmp_path / "no", format=format)
    with pytest.raises(ValueError, match="no plain LoRA: target_parameters"):
        import_lora(tmp_path, tmp_path / "back")
    with pytest.raises(ValueError, match="another base"):
        export_lora(
            _saved(model, tmp_path / "s2ft"),
            tmp_path / "no",
            base=tiny_model("llama", torch.float32),
        )


def test_dense_layers_beside_a_mixture_come_back(tmp_path):
    """Exported as parameters, since PEFT takes their names for those of experts."""
    fields = dict(channels=5, target_modules=r".*mlp\.(gate|down)_proj")
    model = get_peft_model(tiny_model("qwen3_moe", torch.float32), S2FTConfig(**fields))
    want = read_adapter(_saved(model, tmp_path / "s2ft"))
    back = import_lora(export_lora(model, tmp_path / "lora"), tmp_path / "back")
    got = read_adapter(back)
    assert got.keys() == want.keys() == {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "down")}
    for name, part in want.items():
        assert torch.equal(got[name].index, part.index) and torch.equal(got[name].delta, part.delta)
    PeftModel.from_pretrained(tiny_model("qwen3_moe", torch.float32), back)


def _saved(model, path):
    model.save_pretrained(path)
    return path


def test_a_source_or_a_base_that_does_not_fit_is_refused(tmp_path):
    source = toy_adapter(tmp_path / "s2ft", {"mlp.down_proj": toy_slice()})
    out = tmp_path / "lora"
    with pytest.raises(
        ValueError, match=r"mlp\.down_proj: .* up to 599 does not fit .* \(6, 599\)"
    ):
        export_lora(source, out, base=Toy(ffn=599))
    with pytest.raises(ValueError, match=r"delta \(6, 4\) .* does not fit .* \(7, 600\)"):
        export_lora(source, out, base=Toy(hidden=7))
    with pytest.raises(ValueError, match=r"the base model has no module mlp\.down_proj"):
        export_lora(source, out, base=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must be a linear layer of the base, got Embedding"):
        base = Toy()
        base.mlp.down_proj = nn.Embedding(2, 2)
        export_lora(source, out, base=base)
    with pytest.raises(ValueError, match="no configuration of the base model"):
        export_lora(source, out, base=tmp_path / "nowhere")
    toy_adapter(source, {"mlp.down_proj": toy_slice()}, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not name its base model"):
        export_lora(source, out)
    with pytest.raises(TypeError, match="a folder or a PEFT model, got Toy"):
        export_lora(Toy(), out)
    lora = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="holds no S2FT adapter: it is 'LORA'"):
        export_lora(lora, out)
    assert not out.exists()


def test_weights_that_are_stored_transposed(tmp_path):
    """GPT-2's Conv1D holds (K, N)."""
    fields = dict(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    base = GPT2LMHeadModel(GPT2Config(**fields)).double().eval()
    slices = {
        "transformer.h.0.mlp.c_proj": Slice("in", POSITIONS, torch.randn(16, 3).double()),
        "transformer.h.1.attn.c_attn": Slice("out", POSITIONS, torch.randn(3, 16).double()),
    }
    source = toy_adapter(tmp_path / "s2ft", slices)
    out = export_lora(source, tmp_path / "lora", base=base)
    assert read_files(out)[0]["fan_in_fan_out"] is True
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, part in slices.items():
            weight = merged.get_submodule(name).weight
            weight += dense(part, weight.t().shape).t()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(base, out)
    ids = token_ids()
    assert (loaded(ids).logits - merged(ids).logits).abs().max() <= 1e-12


POSITIONS = torch.tensor([40, 7, 12], dtype=torch.int32)


def test_a_failed_export_leaves_the_good_one(tmp_path, monkeypatch):
    model = s2ft_model()
    out = export_lora(model, tmp_path)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def half_way(tensors, path, metadata):
        path.write_bytes(b"\0" * 100)
        raise KeyboardInterrupt

    monkeypatch.setattr("s2kernels.adapter.save_file", half_way)
    with pytest.raises(KeyboardInterrupt):
        export_lora(model, out, format="vllm")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_sum_of_adapters_exports_like_any_other(tmp_path):
    """Two adapters with some channels in common, as one LoRA of exactly that union."""
    ids = token_ids()
    parts = []
    for seed in (3, 4):
        model = s2ft_model(dtype=torch.float64, seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        parts.append(read_adapter(tmp_path / str(seed)))
    total = combine(parts, [0.5, -2.0])
    write_adapter(tmp_path / "sum", total, read_files(tmp_path / "3")[0])
    out = export_lora(tmp_path / "sum", tmp_path / "lora", base=model.get_base_model())

    merged = tiny_model("llama", torch.float64, **WIDE)
    with torch.no_grad():
        for slices, weight in zip(parts, (0.5, -2.0), strict=True):
            for name, part in slices.items():
                target = merged.get_submodule(name).weight
                target += weight * dense(part, target.shape)
    for folder in (tmp_path / "sum", out):
        loaded = PeftModel.from_pretrained(tiny_model("llama", torch.float64, **WIDE), folder)
        assert (loaded(ids).logits - merged(ids).logits).abs().max() <= 1e-12
