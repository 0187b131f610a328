"""`s2kernels generate` and `s2kernels serve` on a tiny model in a folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from served_models import llama, random_slices, with_slices

from s2kernels import cli
from s2kernels.adapter import write_adapter
from s2kernels.cli.models import load_tokenizer

NAMES = ["a", "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """base/, and adapters in a/ and b/."""
    path, model = tmp_path_factory.mktemp("served"), llama(vocab_size=259)
    model.save_pretrained(path / "base")
    for seed, name in enumerate(NAMES):
        write_adapter(path / name, random_slices(model, seed), {})
    return path


def arguments(folder, *options, names=NAMES):
    adapters = [argument for n in names for argument in ("--adapter", f"{n}={folder / n}")]
    return ["--model", str(folder / "base"), "--tokenizer", "bytes", "--device", "cpu"] + [
        "--pool-mib",
        "4",
        *adapters,
        *map(str, options),
    ]


def expected(folder, name, prompt, num, end=()):
    model, tokenizer = llama(vocab_size=259), load_tokenizer("bytes")
    if name is not None:
        model = with_slices(model, random_slices(model, NAMES.index(name)))
    ids = torch.tensor([[*(byte + 3 for byte in prompt.encode()), *end]])
    out = model.generate(ids, do_sample=False, max_new_tokens=num, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def generate(folder, *options, **names):
    cli.main(["generate", *arguments(folder, *options, **names)])


def test_generate_side_by_side(folder, tmp_path, capsys):
    prompts = ["Two and two", "Name a colour."]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    for source in (["--prompts", tmp_path / "prompts.txt"], ["--prompt", *prompts]):
        capsys.readouterr()
        generate(folder, *source, "--max-new-tokens", 9, "--json")
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["prompt"] for line in lines] == prompts
        for line in lines:
            assert line["base"] == expected(folder, None, line["prompt"], 9)
            for name in NAMES:
                assert line["adapters"][name] == expected(folder, name, line["prompt"], 9)


def test_generate_for_people(folder, capsys):
    capsys.readouterr()
    generate(folder, "--prompt", "Hi", "--max-new-tokens", 4)
    out = capsys.readouterr().out
    assert out.startswith("> Hi\n(base)  ")
    assert out.index("\na       ") < out.index("\nb       ")


def test_generate_draws_by_the_seed(folder, capsys):
    def drawn(*options):
        capsys.readouterr()
        generate(folder, "--prompt", "Hi", "--json", "--temperature", 2, *options)
        return capsys.readouterr().out

    assert drawn() == drawn("--seed", 0) != drawn("--seed", 1)


BAD = [
    (["generate"], "there is no prompt: --prompt, or"),
    (["generate", "--prompt", "x", "--adapter", "a"], "invalid NAME=DIR value: 'a'"),
    (["generate", "--prompt", "x", "--adapter", "=b"], "invalid NAME=DIR value"),
    (["generate", "--prompt", "x", "--adapter", "c=/no/such"], "/no/such holds no adapter"),
    (["generate", "--prompt", "x", "--temperature", "-3"], "invalid number from 0 value: '-3'"),
    (["generate", "--prompts", "/no/such.txt"], "No such file"),
    (["serve", "--port", "70000"], "invalid port value: '70000'"),
    (["serve", "--adapter", "base=x"], "that is what the base is called"),
    (["serve", "--host", "203.0.113.7", "--port", "0"], "assign requested address"),
]


@pytest.mark.parametrize(("argv", "message"), BAD)
def test_what_does_not_fit_is_one_line(folder, argv, message, capsys):
    if argv[0] == "serve":
        pytest.importorskip("uvicorn")
    with pytest.raises(SystemExit) as end:
        cli.main([argv[0], *arguments(folder), *argv[1:]])
    error = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert message in error[-1]


def test_a_name_may_be_given_once(folder, capsys):
    with pytest.raises(SystemExit):
        generate(folder, "--prompt", "x", names=["a", "a"])
    assert "name 'a' is taken" in capsys.readouterr().err


def test_a_port_in_use_is_told(folder, capsys):
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as end:
        cli.main(["serve", *arguments(folder, "--port", taken.getsockname()[1])])
    assert end.value.code == 2 and "in use" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_until_a_signal(folder, number):
    pytest.importorskip("uvicorn")
    root = Path(cli.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "s2kernels", "serve", *arguments(folder, "--port", 0)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving base and 2 adapters at http://127.0.0.1:"), line
        body = dict(model="b", prompt="Two and two", temperature=0, max_tokens=9)
        request = urllib.request.Request(
            line.split()[-1] + "/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            (choice,) = json.load(response)["choices"]
        assert choice["text"] == expected(folder, "b", "Two and two", 9, end=[1])
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        assert "Traceback" not in error
    finally:
        process.kill()
        process.wait()
