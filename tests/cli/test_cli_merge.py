"""`s2kernels merge`: the weights of base + adapter, in the dtype that is asked for."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from saved_adapters import without_digests
from tiny_models import tiny_model

from s2kernels import cli
from s2kernels.adapter import read_adapter
from s2kernels.peft import S2FTConfig


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def checkpoint(request, tmp_path):
    """The dtype of a base in base/, of which adapter/ is an adapter, trained in that dtype."""
    model = tiny_model("llama", request.param)
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, S2FTConfig(heads=3, channels=5, task_type="CAUSAL_LM"))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    return request.param


def fill(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_delta" in name:
                parameter.normal_(std=0.3)


def merge(folder, *options):
    argv = ["merge", folder / "adapter", "--base", folder / "base", "--output", folder / "merged"]
    cli.main([*map(str, argv), *options])
    return load_file(folder / "merged" / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_base_is_not_rounded_before_it_is_merged(dtype, checkpoint, tmp_path):
    got = merge(tmp_path, "--dtype", dtype)
    want = {k: v.double() for k, v in load_file(tmp_path / "base" / "model.safetensors").items()}
    slices = read_adapter(tmp_path / "adapter")
    assert len(slices) == 4
    for name, part in slices.items():
        want[f"{name}.weight"][:, part.index.long()] += part.delta.double()
    wide = torch.promote_types(checkpoint, getattr(torch, dtype))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == getattr(torch, dtype)
        assert torch.equal(got[name], value.to(wide).to(got[name].dtype)), name
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("checkpoint", [torch.float32], indirect=True)
def test_what_fp16_cannot_hold_is_refused(checkpoint, tmp_path, capsys):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("0.mlp.down_proj.s2ft_delta"))
    tensors[key][2, 1] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    without_digests(path.parent)
    with pytest.raises(SystemExit) as stop:
        merge(tmp_path, "--dtype", "float16")
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "model.layers.0.mlp.down_proj.weight is not finite in torch.float16" in line
    assert not (tmp_path / "merged").exists()
    got = merge(tmp_path, "--dtype", "bfloat16")
    assert got["model.layers.0.mlp.down_proj.weight"].abs().max() > 9e4
