"""vLLM with S2FT adapters as they are, beside the LoRAs that they are exported to.

    make test-vllm          in an environment that has vLLM; it runs
    python -m bench.vllm_serving [--output bench/results/cpu/vllm.json]

16 adapters of a Llama of hidden size 1024 with 4 layers, each of 4 heads of o_proj (256 channels)
and 220 channels of down_proj in every layer, all in slots at once. Three engines run: without
adapters, with the plugin, and with the exported LoRAs at vLLM's next rank, 256. They take turns, so
that a ratio is of times right after one another. A server over HTTP then answers for all adapters
and the base; its tokens are compared with those of PEFT, which has one adapter at a time. Exit code
1 where a token is wrong or a goal of `GOALS` is missed.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.measure import machine
from bench.measure.served import HEAD, LAYERS, VOCAB, adapter, llama
from s2kernels.adapter import write_adapter
from s2kernels.files import replacing
from s2kernels.lora import export_lora

HIDDEN, FFN = 1024, 2816
ADAPTERS, HEADS_OF_O, CHANNELS, RANK = 16, 4, 220, 256
NATIVE_RANK = 8  # of the LoRAs that may be served beside
PROMPT, TOKENS = 30, 24
ROUNDS = 5
TARGETS = ["o_proj", "down_proj"]
PER_ADAPTER = LAYERS * (HEADS_OF_O * HEAD + CHANNELS)
GOALS = {
    "decode, native / exported": 0.35,
    "prefill, native / exported": 0.15,
    "slot bytes, native / exported": 0.40,
    "load over HTTP, median s": 0.1,
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.vllm_serving", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    os.environ.update(ENVIRONMENT)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = _prepare(folder)
        expected = _tokens_of_peft(folder, prompts)
        engines, server = _engines(folder, args.rounds), _server(folder, prompts, expected)
    engines["figures"]["load over HTTP, median s"] = statistics.median(server["load_seconds"])
    found = {
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers", "peft")},
        "load_average_before": load,
        "load_average_after": os.getloadavg()[0],
        **engines,
        **server,
    }
    print(json.dumps(found, indent=1))
    if args.output is not None:
        info = machine.machine_info(torch.device("cpu"))
        with replacing(args.output.parent) as written:
            text = json.dumps({"machine_info": info, **found}, indent=1)
            (written / args.output.name).write_text(text + "\n", encoding="utf-8")
    missed = [name for name, most in GOALS.items() if found["figures"][name] > most]
    for name in missed:
        print(f"missed: {name} is {found['figures'][name]:.3f}, at most {GOALS[name]} wanted")
    return 1 if missed or found["tokens"]["wrong"] else 0


def _prepare(folder: Path) -> dict[str, list[int]]:
    """A base and adapters in folders, both as they are and exported; a prompt for each, and one for
    the base, "base".
    """
    model = llama(HIDDEN, FFN)
    model.save_pretrained(folder / "base")
    for number in range(ADAPTERS):
        path = folder / f"a{number}"
        slices = adapter(number, HEADS_OF_O * HEAD, CHANNELS, HIDDEN, FFN)
        write_adapter(path, slices, {"task_type": "CAUSAL_LM"})
        export_lora(path, folder / f"lora{number}", format="vllm", base=model)
    names = [*(f"a{number}" for number in range(ADAPTERS)), "base"]
    return {name: torch.randint(3, VOCAB, (PROMPT,)).tolist() for name in names}


def _tokens_of_peft(folder: Path, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    import s2kernels.peft  # noqa: F401 - PEFT reads our adapters then

    found = {}
    for name, prompt in prompts.items():
        model: Any = LlamaForCausalLM.from_pretrained(folder / "base").eval()
        if name != "base":
            model = PeftModel.from_pretrained(model, folder / name).eval()
        greedy = dict(max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        out = model.generate(input_ids=torch.tensor([prompt]), **greedy)
        found[name] = out[0, len(prompt) :].tolist()
    return found


# The engines, each in a process of its own, which waits for the others' turns.


def _options(kind: str) -> dict[str, Any]:
    common: dict[str, Any] = dict(
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=ADAPTERS + 1,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
    )
    if kind == "base":
        return common
    common |= dict(enable_lora=True, max_loras=ADAPTERS, lora_target_modules=TARGETS)
    if kind == "exported":
        return common | dict(max_lora_rank=RANK)
    return common | dict(
        max_lora_rank=NATIVE_RANK, additional_config={"s2ft_channels": PER_ADAPTER}
    )


def _engine(kind: str, folder: Path, turns: Any) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(str(folder / "base"), **_options(kind)).llm_engine
    stem = {"base": "", "native": "a", "exported": "lora"}[kind]

    def steps(num_tokens: int) -> list[float]:
        sampling = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        for number in range(ADAPTERS):
            prompt = {"prompt_token_ids": torch.randint(3, VOCAB, (PROMPT,)).tolist()}
            path = str(folder / f"{stem}{number}")
            lora = LoRARequest(f"a{number}", number + 1, path) if stem else None
            engine.add_request(str(number), prompt, sampling, lora_request=lora)
        seconds = []
        while engine.has_unfinished_requests():
            began = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - began)
        return seconds

    steps(2)  # loads the adapters
    turns.send(_slot_bytes(engine) if stem else 0)
    while (what := turns.recv()) is not None:
        if what == "prefill":
            turns.send(sum(steps(1)))
        else:
            turns.send(statistics.median(steps(8)[2:]))


def _slot_bytes(engine: Any) -> int:
    """All that the slots hold: the factors of LoRAs, and the pool of the plugin."""
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    manager = runner.lora_manager._adapter_manager
    stacks = [
        stack
        for module in manager.modules.values()
        for stack in (*module.lora_a_stacked, *module.lora_b_stacked)
    ]
    store = manager.s2ft._store
    pool = [] if store is None else [store.pool.rows]
    return sum(tensor.nbytes for tensor in (*stacks, *pool))


def _engines(folder: Path, rounds: int) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    turns, slots = {}, {}
    for kind in ("base", "native", "exported"):
        here, there = spawn.Pipe()
        process = spawn.Process(target=_engine, args=(kind, folder, there), daemon=True)
        process.start()
        turns[kind] = here, process
        there.close()
        slots[kind] = here.recv()
    seconds: dict[str, dict[str, list[float]]] = {"decode": {}, "prefill": {}}
    for _ in range(rounds):
        for what, of_kind in seconds.items():
            for kind, (turn, _) in turns.items():
                turn.send(what)
                of_kind.setdefault(kind, []).append(turn.recv())
    for turn, process in turns.values():
        turn.send(None)
        process.join()

    def ratio(what: str, a: str, b: str) -> float:
        pairs = zip(seconds[what][a], seconds[what][b], strict=True)
        return statistics.median(x / y for x, y in pairs)

    ratios = {
        f"{what}, {a} / {b}": ratio(what, a, b)
        for what in seconds
        for a, b in (("native", "exported"), ("native", "base"), ("exported", "base"))
    }
    ratios["slot bytes, native / exported"] = slots["native"] / slots["exported"]
    return {"figures": ratios, "seconds": seconds, "slot_bytes": slots}


# The server.


def _server(
    folder: Path, prompts: dict[str, list[int]], expected: dict[str, list[int]]
) -> dict[str, Any]:
    """Half of the adapters are there from the start, the others are loaded while it runs."""
    names = [name for name in prompts if name != "base"]
    first, later = names[: len(names) // 2], names[len(names) // 2 :]
    with _running(folder, first) as port:
        loads = []
        for name in later:
            began = time.perf_counter()
            _post(port, "load_lora_adapter", lora_name=name, lora_path=str(folder / name))
            loads.append(time.perf_counter() - began)
        with ThreadPoolExecutor(len(prompts)) as pool:
            got = list(pool.map(lambda item: _complete(port, *item), prompts.items()))
    wanted = [expected[name] for name in prompts]
    wrong = sum(a != b for g, w in zip(got, wanted, strict=True) for a, b in zip(g, w, strict=True))
    tokens = {"rows": len(got), "compared": sum(map(len, wanted)), "wrong": wrong}
    return {"tokens": tokens, "load_seconds": loads}


@contextmanager
def _running(folder: Path, names: list[str]) -> Any:
    """The port of a server with these adapters, as a user starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder / "base"), "--served-model-name", "base"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--skip-tokenizer-init", "--max-model-len", "128"]
    command += ["--max-num-seqs", str(ADAPTERS + 1), "--enable-lora"]
    command += ["--max-loras", str(ADAPTERS), "--max-lora-rank", str(NATIVE_RANK)]
    command += ["--additional-config", json.dumps({"s2ft_channels": PER_ADAPTER})]
    command += ["--lora-modules", *(f"{name}={folder / name}" for name in names)]
    server = subprocess.Popen(command)
    try:
        while not _is_up(port):
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}")
            time.sleep(0.5)
        yield port
    finally:
        server.terminate()
        server.wait(60)


def _is_up(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _post(port: int, path: str, **fields: Any) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", f"/v1/{path}", json.dumps(fields), headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"{path}: {response.status} {text}")
    return text


def _complete(port: int, name: str, prompt: list[int]) -> list[int]:
    fields = dict(model=name, prompt=prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
    answer = json.loads(_post(port, "completions", **fields, return_token_ids=True))
    return answer["choices"][0]["token_ids"]


if __name__ == "__main__":
    raise SystemExit(main())
