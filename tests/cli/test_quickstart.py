"""Every command of docs/quickstart.md runs as it is written, on a tiny model and a free port."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from s2kernels import cli

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"
# What needs the network, and what another test runs.
ELSEWHERE = ("git clone", "python3 -m venv", "pip install", "python -m bench.demo.llm")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def commands() -> list[str]:
    return re.findall(r"^    (\S.*)$", PAGE.read_text("utf-8"), re.MULTILINE)


def save_tiny(folder: Path) -> None:
    """A tiny Llama and a tokenizer of bytes with a chat template."""
    names = {"<pad>": 0, "</s>": 1}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = names | {character: i + 2 for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    tiny_model(
        "llama",
        torch.float32,
        vocab_size=len(vocabulary),
        max_position_embeddings=512,
        eos_token_id=1,
    ).save_pretrained(folder)


@pytest.mark.slow
def test_every_command_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "models" / "smollm2")
    (shown,) = re.findall(r"```json\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    Path("train.json").write_text(json.dumps(json.loads(shown) * 6))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    server = None
    ran = []
    try:
        for line in commands():
            if line.startswith(ELSEWHERE):
                continue
            words = shlex.split(line.replace("8000", port))
            ran.append(" ".join(words[:2]))
            if words[:2] == ["s2kernels", "serve"]:
                command = [sys.executable, "-m", "s2kernels", *words[1:], "--pool-mib", "4"]
                server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
                assert "adapters at http" in server.stdout.readline()
            elif words[0] == "curl":
                if shutil.which("curl") is None:
                    pytest.skip("there is no curl here")
                answer = json.loads(subprocess.check_output(words, timeout=60))
                assert answer["choices"][0]["message"]["role"] == "assistant"
            else:
                assert words[0] == "s2kernels"
                cli.main(words[1:])
    finally:
        if server is not None:
            server.terminate()
            server.wait(120)
    assert ran == [
        *["s2kernels finetune"] * 3,
        *["s2kernels inspect", "s2kernels generate", "s2kernels evaluate"],
        *["s2kernels merge", "s2kernels export-lora", "s2kernels serve", "curl -s"],
    ]
    out = capsys.readouterr().out
    assert "> Name the capital of France.\nbefore" in out and "> Add 2 and 3." in out
    first, last = re.findall(r"held-out loss ([\d.]+) -> ([\d.]+) in 60 steps", out)[0]
    assert float(last) < float(first)
    assert json.loads(Path("adapter/metrics.json").read_text())["steps"] == 80
    assert json.loads(Path("lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    base, adapter = re.findall(r"(?:base|adapter) +loss per token ([\d.]+)", out)
    assert float(adapter) < float(base)
