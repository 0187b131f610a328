"""`s2kernels finetune` under FSDP2, with what `accelerate launch` sets."""

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sharded_models import batches, engaging_fsdp
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from s2kernels import cli

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 259,
    "initializer_range": 0.2,
}


def arguments(folder, output, *options):
    data = folder / "data.json"
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(6)]
    data.write_text(json.dumps(rows))
    base = folder / "base"
    if not base.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(base)
    fixed = ["finetune", "--data", data, "--tokenizer", "bytes", "--output", folder / output]
    fixed += ["--model", base, "--device", "cpu", "--max-steps", "3"]
    fixed += ["--held-out", "7", "--lr", "0.01", "--save-steps", "2", *options]
    return [str(each) for each in fixed]


def _finetune(rank, argv):
    before = os.environ.copy()
    places = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(FSDP | places)
    try:
        with engaging_fsdp():
            cli.main(argv)
    except (SystemExit, ValueError) as error:
        return str(error)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.slow
def test_finetune_is_the_same_sharded_and_goes_on_from_a_checkpoint(ranks, tmp_path, capsys):
    cli.main(arguments(tmp_path, "one", "--batch-size", "8"))
    argv = arguments(tmp_path, "two", "--batch-size", "4")
    assert ranks.run(_finetune, argv) == [None, None]
    one, two = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")
    )
    assert one["trained_parameters"] == two["trained_parameters"]
    for name, most in (("loss", 2e-6), ("held_out_loss", 1e-6)):
        for (_, left), (_, right) in zip(two[name], one[name], strict=True):
            assert abs(left - right) <= most

    tokens = batches(1)[0]
    found = []
    for name in ("one", "two"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        found.append(PeftModel.from_pretrained(base, tmp_path / name).eval()(tokens).logits)
    assert (found[0] - found[1]).abs().max() < 1e-5

    trained = load_file(tmp_path / "two" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "two" / "checkpoint-3")
    (tmp_path / "two" / "adapter_model.safetensors").unlink()
    assert ranks.run(_finetune, [*argv, "--resume"]) == [None, None]
    resumed = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert all((resumed[name] == value).all() for name, value in trained.items())


def test_no_process_answers_a_prompt_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit):
        cli.main(arguments(tmp_path, "out", "--prompt", "1+1="))
    assert "--prompt: one process answers" in capsys.readouterr().err


@pytest.mark.slow
def test_finetune_of_spiel_sharded_is_refused(ranks, tmp_path):
    argv = arguments(tmp_path, "out", "--batch-size", "4", "--method", "spiel")
    for said in ranks.run(_finetune, argv):
        assert "entries cannot be replaced" in said
