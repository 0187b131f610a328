"""The commands that take an adapter, of each method, with a module that was trained whole."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from saved_adapters import without_digests
from tiny_models import tiny_model, token_ids
from transformers import AutoModelForCausalLM

from s2kernels import cli
from s2kernels.peft import S2FTConfig, SpIELConfig

CONFIGS = {
    "S2FT": (S2FTConfig, dict(heads=3, channels=5)),
    "SPIEL": (SpIELConfig, dict(num_tunable_weights=1500, delta_dtype="bfloat16")),
}


@pytest.fixture(params=CONFIGS)
def method(request, tmp_path):
    """The method of adapter/, which has trained the head of base/, too."""
    base = tiny_model("llama", torch.float32)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    kind, fields = CONFIGS[request.param]
    config = kind(task_type="CAUSAL_LM", modules_to_save=["lm_head"], **fields)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    model.save_pretrained(tmp_path / "adapter")
    return request.param


def logits(model):
    with torch.no_grad():
        return model.eval()(token_ids()).logits


def load(path):
    return AutoModelForCausalLM.from_pretrained(path)


def test_a_merged_model_is_base_and_adapter_and_trained_head(method, tmp_path):
    cli.main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])
    want = logits(PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter"))
    torch.testing.assert_close(logits(load(tmp_path / "merged")), want, rtol=1e-5, atol=1e-5)
    head = "lm_head.weight"
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged[head], adapter["base_model.model." + head])
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert not torch.equal(merged[head], base[head])
    assert not torch.equal(*(x["model.layers.1.mlp.down_proj.weight"] for x in (merged, base)))


def test_inspect_lists_every_tensor(method, tmp_path, capsys):
    cli.main(["inspect", str(tmp_path / "adapter"), "--json"])
    report = json.loads(capsys.readouterr().out)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = {}
    for key, tensor in tensors.items():
        if key.endswith("_delta"):
            trained[key.removeprefix("base_model.model.").rpartition(".")[0]] = tensor
    assert report["method"] == method and len(trained) == {"S2FT": 4, "SPIEL": 14}[method]
    trained["lm_head.weight"] = tensors["base_model.model.lm_head.weight"]
    assert {row["module"]: row["parameters"] for row in report["layers"]} == {
        name: tensor.numel() for name, tensor in trained.items()
    }
    assert {row["module"]: row["bytes"] for row in report["layers"]} == {
        name: tensor.nbytes for name, tensor in trained.items()
    }
    total = sum(tensor.numel() for tensor in trained.values())
    assert report["total"]["parameters"] == total
    if method == "SPIEL":
        head = trained.pop("lm_head.weight")
        assert report["total"]["entries"] == total - head.numel()
        rows = {row["module"]: row for row in report["layers"]}
        assert rows["lm_head.weight"]["entries"] is None
        assert {rows[name]["dtype"] for name in trained} == {"bfloat16"}
        assert all(rows[name]["entries"] == len(delta) for name, delta in trained.items())

    cli.main(["inspect", str(tmp_path / "adapter")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "module" and len(lines) == len(report["layers"]) + 2
    assert f"{total:,}" in lines[-1]


@pytest.mark.parametrize("method", ["SPIEL"], indirect=True)
@pytest.mark.parametrize("damage", ["delta", "index", "short index", "all"])
def test_a_damaged_adapter_is_not_merged(damage, method, tmp_path, capsys):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj"
    key = f"base_model.model.{name}.spiel_{damage.split()[-1]}"
    if damage == "all":
        tensors, name = {k: v for k, v in tensors.items() if "spiel" not in k}, "no SpIEL adapter"
    elif damage == "short index":
        tensors[key] = tensors[key][:-1]
    else:
        del tensors[key]
    save_file(tensors, path, metadata={"format": "pt"})
    without_digests(path.parent)
    for argv in (["inspect"], ["merge", "--output", str(tmp_path / "merged")]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*argv, str(tmp_path / "adapter")])
        assert stop.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"{tmp_path / 'adapter'}" in line and name in line
    assert not (tmp_path / "merged").exists()
