"""`s2kernels merge` where adapter and base do not fit: refused, and nothing is drawn at random."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from saved_adapters import TENSORS, edit_config, without_digests
from tiny_models import tiny_model, token_ids
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from s2kernels import cli
from s2kernels.peft import S2FTConfig, SpIELConfig

CONFIGS = {
    "s2ft": lambda **fields: S2FTConfig(heads=3, channels=5, **fields),
    "spiel": lambda **fields: SpIELConfig(num_tunable_weights=900, **fields),
}


@pytest.fixture(params=CONFIGS)
def method(request):
    return CONFIGS[request.param]


@pytest.fixture
def base(tmp_path):
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(model, config, folder):
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    model.save_pretrained(folder)
    return model.eval()


def merge(tmp_path):
    names = ("adapter", "--base", "base", "--output", "merged")
    cli.main(["merge", *(n if n.startswith("--") else str(tmp_path / n) for n in names)])
    return tmp_path / "merged"


def refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        merge(tmp_path)
    assert stop.value.code == 2
    assert not (tmp_path / "merged").exists()
    return capsys.readouterr().err.splitlines()[-1]


def test_an_adapter_of_the_model_without_its_head_is_refused(method, base, tmp_path, capsys):
    adapter(AutoModel.from_pretrained(base), method(), tmp_path / "adapter")
    assert "layers.0" in refused(tmp_path, capsys)
    without_digests(tmp_path / "adapter")
    assert "layers.0" in refused(tmp_path, capsys)


@pytest.mark.parametrize("change", ["module.", "more", "fewer"])
def test_every_tensor_must_land(change, method, base, tmp_path, capsys):
    folder = tmp_path / "adapter"
    adapter(AutoModelForCausalLM.from_pretrained(base), method(), folder)
    prefix = "base_model.model."
    tensors = load_file(folder / TENSORS)
    if change == "module.":
        tensors = {n.replace(prefix, f"{prefix}module."): t for n, t in tensors.items()}
        name = "module.model.layers.0"
    elif change == "more":
        name = "model.norm.scale"
        tensors[prefix + name] = torch.ones(32)
    else:
        name = "layers.1.mlp.down_proj"
        tensors = {n: t for n, t in tensors.items() if name not in n}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    without_digests(folder)
    assert name in refused(tmp_path, capsys)


@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize(
    ("task", "kind", "head"),
    [
        ("SEQ_CLS", AutoModelForSequenceClassification, "score.weight"),
        ("TOKEN_CLS", AutoModelForTokenClassification, "score.weight"),
    ],
)
def test_a_trained_head_is_kept(task, kind, head, num_labels, method, base, tmp_path):
    folder = tmp_path / "adapter"
    model = adapter(
        kind.from_pretrained(base, num_labels=num_labels),
        method(task_type=task, modules_to_save=["score"]),
        folder,
    )
    want = model(input_ids=token_ids()).logits
    merged = load_file(merge(tmp_path) / "model.safetensors")
    assert torch.equal(merged[head], load_file(folder / TENSORS)["base_model.model." + head])
    got = kind.from_pretrained(tmp_path / "merged").eval()(input_ids=token_ids()).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_trained_head_that_the_model_lacks_is_refused(method, base, tmp_path, capsys):
    folder = tmp_path / "adapter"
    model = AutoModelForSequenceClassification.from_pretrained(base)
    adapter(model, method(task_type="SEQ_CLS", modules_to_save=["score"]), folder)
    edit_config(folder, task_type="CAUSAL_LM")
    assert "score.weight" in refused(tmp_path, capsys)


def test_a_base_that_lacks_tensors_is_refused(method, base, tmp_path, capsys):
    adapter(AutoModelForCausalLM.from_pretrained(base), method(), tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" in refused(tmp_path, capsys)
    argv = ["select", "--model", str(base), "--strategy", "weight", "--heads", "1"]
    with pytest.raises(SystemExit):
        cli.main([*argv, "--channels", "1", "--output", str(tmp_path / "x.json")])
    assert "lm_head.weight" in capsys.readouterr().err


def test_what_the_adapter_has_trained_whole_the_base_may_lack(method, base, tmp_path):
    folder = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    model = adapter(model, method(task_type="CAUSAL_LM", modules_to_save=["lm_head"]), folder)
    want = model(input_ids=token_ids()).logits
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    got = AutoModelForCausalLM.from_pretrained(merge(tmp_path)).eval()(input_ids=token_ids()).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_not_missing(method, base, tmp_path):
    tiny_model("llama", torch.float32, tie_word_embeddings=True).save_pretrained(base)
    model = adapter(AutoModelForCausalLM.from_pretrained(base), method(), tmp_path / "adapter")
    got = AutoModelForCausalLM.from_pretrained(merge(tmp_path)).eval()(input_ids=token_ids()).logits
    torch.testing.assert_close(got, model(input_ids=token_ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model_type="llamaz"), "no model type 'llamaz'"),
        (dict(model_type=None), "no model type None"),
        (dict(model_type="t5"), "no causal language model of type 't5'"),
    ],
)
def test_an_unknown_model_type_is_told_in_a_short_line(fields, message, base, tmp_path, capsys):
    adapter(AutoModelForCausalLM.from_pretrained(base), CONFIGS["s2ft"](), tmp_path / "adapter")
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    line = refused(tmp_path, capsys)
    assert message in line and len(line) < 300


def test_a_model_and_its_adapter_still_merge(method, base, tmp_path):
    model = adapter(AutoModelForCausalLM.from_pretrained(base), method(), tmp_path / "adapter")
    got = AutoModelForCausalLM.from_pretrained(merge(tmp_path)).eval()(input_ids=token_ids()).logits
    torch.testing.assert_close(got, model(input_ids=token_ids()).logits, rtol=1e-5, atol=1e-5)
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    assert torch.equal(again.eval()(input_ids=token_ids()).logits, model(token_ids()).logits)
