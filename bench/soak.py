"""Clients at a running server, for minutes: are all answers right, and does it stay as it is?

    python -m bench.soak [--minutes 10] [--clients 8] [--output bench/results/cpu/soak.json]

`s2kernels serve` runs on a small random Llama with adapters of which its pool holds half. Clients
ask, with and without streams, and compare every answer with that of the model with the adapter in
its weights; some leave early, and some ask for what cannot be. Meanwhile other adapters are loaded
and unloaded. Exit code 1 where a text was wrong, a bad request not a 4xx, or memory grew.
"""

import argparse
import copy
import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bench.measure import machine
from s2kernels.adapter import Slice, write_adapter
from s2kernels.files import replacing

HIDDEN, FFN, LAYERS = 64, 176, 2
ADAPTERS, CHANNELS, PROMPTS, TOKENS = 12, 88, 6, 24
POOL_MIB = 1
GROWTH = 1.05  # of memory, see `growth`
JSON = {"Content-Type": "application/json"}
BAD: list[dict[str, Any]] = [
    {},
    {"prompt": "x", "model": "no such"},
    {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "max_tokens": 10**6},
    {"prompt": [10**6]},
    {"prompt": "x" * 5000},
    {"prompt": "x", "temperature": "hot"},
    {"prompt": "x", "n": 3},
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), args.minutes * 60, args.clients)
    device = torch.device("cpu")
    document = {"machine_info": machine.machine_info(device), **found}
    text = json.dumps(document, indent=1)
    print(json.dumps(found, indent=1))
    if args.output is not None:
        with replacing(args.output.parent) as written:
            (written / args.output.name).write_text(text + "\n", encoding="utf-8")
    counts = found["counts"]
    wrong = counts.get("wrong", 0) + counts.get("bad, not a 4xx", 0) + counts.get("failed", 0)
    return 1 if wrong or found["growth"] > GROWTH else 0


def soak(folder: Path, seconds: float, clients: int) -> dict[str, Any]:
    wanted = _prepare(folder)
    adapters = [f"--adapter=a{i}={folder / f'a{i}'}" for i in range(ADAPTERS)]
    server = subprocess.Popen(
        [sys.executable, "-m", "s2kernels", "serve", "--model", str(folder / "base"), *adapters]
        + ["--tokenizer", "bytes", "--device", "cpu", "--port", "0", "--pool-mib", str(POOL_MIB)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().split(":")[-1].split("/")[0])
        counts: Counter[str] = Counter()
        end, memory = time.monotonic() + seconds, []
        threads = [
            threading.Thread(target=_client, args=(port, wanted, seed, end, counts))
            for seed in range(clients)
        ]
        threads.append(threading.Thread(target=_loader, args=(port, folder, end, counts)))
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            time.sleep(min(2.0, seconds / 20))
            memory.append(_resident_bytes(server.pid))
        for thread in threads:
            thread.join()
    finally:
        server.terminate()
        code = server.wait(60)
    return {
        "seconds": seconds,
        "clients": clients,
        "counts": dict(sorted(counts.items())),
        "exit_code": code,
        "resident_bytes": memory,
        "growth": growth(memory),
    }


def growth(memory: list[int]) -> float:
    """The most in the last fifth of the time over the most in the second, when all has begun."""
    fifth = max(1, len(memory) // 5)
    return max(memory[-fifth:]) / max(memory[fifth : 2 * fifth])


def _prepare(folder: Path) -> dict[tuple[str, str], str]:
    """A base and adapters in folders; the right answer of each adapter to each prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from s2kernels.cli.models import load_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=None,
    )
    model, tokenizer = LlamaForCausalLM(config).eval(), load_tokenizer("bytes")
    model.save_pretrained(folder / "base")
    prompts = [f"Prompt number {number}, " + "and so on " * number for number in range(PROMPTS)]
    wanted = {}
    for number in [None, *range(ADAPTERS)]:
        name, written = "base", model
        if number is not None:
            name, written = f"a{number}", copy.deepcopy(model)
            slices = _slices(number)
            write_adapter(folder / name, slices, {})
            for module, part in slices.items():
                weight = written.get_submodule(module).weight.data
                weight.index_add_(part.axis, part.index.long(), part.delta)
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            out = written.generate(ids, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
            text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            wanted[name, prompt] = text
    return wanted


def _slices(seed: int) -> dict[str, Slice]:
    generator = torch.Generator().manual_seed(seed)
    slices = {}
    for layer in range(LAYERS):
        for name, dim, size in (
            ("self_attn.o_proj", "in", HIDDEN),
            ("mlp.down_proj", "in", FFN),
            ("mlp.up_proj", "out", FFN),
            ("mlp.gate_proj", "out", FFN),
        ):
            index = torch.randperm(size, generator=generator)[:CHANNELS].int()
            delta = torch.randn(len(index), HIDDEN, generator=generator) * 0.1
            slices[f"model.layers.{layer}.{name}"] = Slice(
                dim, index, delta.t().contiguous() if dim == "in" else delta
            )
    return slices


def _client(
    port: int, wanted: dict[tuple[str, str], str], seed: int, end: float, counts: Counter[str]
) -> None:
    draw, known = random.Random(seed), sorted(wanted)
    while time.monotonic() < end:
        kind = draw.choices(["ask", "stream", "leave", "bad"], [5, 3, 1, 1])[0]
        if kind == "bad":
            status, _ = _post(port, "/v1/completions", draw.choice(BAD))
            counts["bad" if 400 <= status < 500 else "bad, not a 4xx"] += 1
            continue
        name, prompt = draw.choice(known)
        body = dict(model=name, prompt=prompt, max_tokens=TOKENS, temperature=0)
        if kind == "leave":
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            connection.request(
                "POST", "/v1/completions", json.dumps(body | dict(stream=True)), JSON
            )
            connection.getresponse().read(20)
            connection.close()
            counts["left"] += 1
            continue
        status, content = _post(port, "/v1/completions", body | dict(stream=kind == "stream"))
        if status != 200:
            counts["failed"] += 1
            continue
        if kind == "stream":
            events = [line[6:] for line in content.split("\n\n") if line and "[DONE]" not in line]
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
        else:
            text = json.loads(content)["choices"][0]["text"]
        counts["right" if text == wanted[name, prompt] else "wrong"] += 1


def _loader(port: int, folder: Path, end: float, counts: Counter[str]) -> None:
    """Loads an adapter, asks it once, and unloads it, again and again."""
    number = 0
    while time.monotonic() < end:
        number += 1
        name, body = f"extra {number}", {"path": str(folder / f"a{number % ADAPTERS}")}
        loaded, _ = _post(port, "/v1/adapters", {"name": name, **body})
        asked, _ = _post(port, "/v1/completions", {"model": name, "prompt": "x"})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("DELETE", "/v1/adapters/" + name.replace(" ", "%20"))
        unloaded = connection.getresponse().status
        connection.close()
        counts["loaded" if loaded == asked == unloaded == 200 else "failed"] += 1
        time.sleep(0.2)


def _post(port: int, path: str, body: dict[str, Any]) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, json.dumps(body), JSON)
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response.status, content


def _resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
