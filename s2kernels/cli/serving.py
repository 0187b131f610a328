"""`s2kernels serve` and `s2kernels generate`: one model with any number of adapters."""

import json
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from s2kernels.cli.answers import answers, encode, prompt_of, show
from s2kernels.cli.models import device_of, load_model, load_tokenizer
from s2kernels.serve import Serving

PAGE = 32
CACHE_TOKENS, BATCH_TOKENS = 16384, 256  # on a CPU
GRACE_SECONDS = 10


def generate(args: Namespace) -> Callable[[], None]:
    """Everything but the generation, which is returned."""
    prompts = [args.prompt] if args.prompts is None else _read_prompts(args.prompts)
    names: list[str | None] = [*([] if args.no_base else [None]), *(n for n, _ in args.adapter)]
    if not names:
        raise ValueError("--no-base needs an --adapter")
    serving, tokenizer = _load(args)
    encoded = [encode(tokenizer, prompt_of(text, args.template, tokenizer)) for text in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(f"a prompt must have at least one token, got {prompt!r}")

    def work() -> None:
        torch.manual_seed(args.seed)
        made = partial(serving.generate, adapters=names)
        for prompt, ids in zip(prompts, encoded, strict=True):
            rows, device = [ids] * len(names), serving.model.device
            found = answers(made, tokenizer, rows, device, args.max_new_tokens, args.temperature)
            show(prompt, {n or "(base)": t for n, t in zip(names, found, strict=True)}, args.json)

    return work


def serve(args: Namespace) -> Callable[[], None]:
    """Everything up to the listening socket; serving itself is returned."""
    import uvicorn

    from s2kernels.serve.openai import application
    from s2kernels.serve.sampling import complete, configure

    name = args.name or args.model.resolve().name
    if name in dict(args.adapter):
        raise ValueError(f"--adapter {name}: that is what the base is called; see --name")
    listening = socket.create_server((args.host, args.port))
    try:
        serving, tokenizer = _load(args)
    except BaseException:
        listening.close()
        raise
    generation = GenerationConfig.from_model_config(serving.model.config)
    generation.eos_token_id = serving.model.generation_config.eos_token_id
    batching = _batching(args.cache_tokens, serving.model.device)
    configure(generation, batching)
    context = getattr(
        serving.model.config.get_text_config(), "max_position_embeddings", sys.maxsize
    )

    def work() -> None:
        with listening, serving.continuous_batching(generation, batching) as manager:
            complete(manager)
            app = application(serving, manager, tokenizer, name, context)
            host, port = listening.getsockname()[:2]
            print(f"serving {name} and {len(args.adapter)} adapters at http://{host}:{port}/v1")
            sys.stdout.flush()
            config = uvicorn.Config(
                app, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS
            )
            server = uvicorn.Server(config)
            with _ending(server):
                server.run(sockets=[listening])

    return work


@contextmanager
def _ending(server: Any) -> Iterator[None]:
    """Signals end the server, and not the process before the model is put away.

    uvicorn raises them again once it is done.
    """

    def end(*_: Any) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _load(args: Namespace) -> tuple[Serving, Any]:
    tokenizer = load_tokenizer(args.tokenizer or str(args.model))
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = load_model(args.model, dtype).eval()
    model.to(device_of(args.device))
    serving = Serving(model, pool_bytes=args.pool_mib * 2**20)
    for name, path in args.adapter:
        serving.register(name, path)
    return serving, tokenizer


def _batching(cache_tokens: int | None, device: torch.device) -> ContinuousBatchingConfig:
    config = ContinuousBatchingConfig(page_size=PAGE)
    if device.type == "cpu":
        # What transformers takes of the host's memory by itself is nearly all of it.
        cache_tokens = cache_tokens or CACHE_TOKENS
        config.max_batch_tokens = BATCH_TOKENS
    if cache_tokens is not None:
        config.num_blocks = -(-cache_tokens // PAGE)
    return config


def _read_prompts(path: Path) -> list[str]:
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        try:
            found = [json.loads(line)["prompt"] for line in lines]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"--prompts: {path}: 'prompt' in each line wanted: {error}") from None
        if not all(isinstance(prompt, str) for prompt in found):
            raise ValueError(f"--prompts: {path}: every 'prompt' must be a text")
        lines = found
    if not lines:
        raise ValueError(f"--prompts: {path} holds no prompt")
    return lines
