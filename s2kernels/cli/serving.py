"""`s2kernels serve` and `s2kernels generate`: one model with any number of adapters."""

import json
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from s2kernels.cli.models import load_model, load_tokenizer
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
    encoded = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if not tokens["input_ids"].numel():
            raise ValueError(f"a prompt must have at least one token, got {prompt!r}")

    def work() -> None:
        sampling: dict[str, Any] = dict(do_sample=False)
        if args.temperature:
            sampling = dict(do_sample=True, temperature=args.temperature, top_k=0)
            torch.manual_seed(args.seed)
        for prompt, tokens in zip(prompts, encoded, strict=True):
            rows = tokens["input_ids"].expand(len(names), -1).to(serving.model.device)
            out = serving.generate(
                rows,
                adapters=names,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=args.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id or 0,
                **sampling,
            )
            answers = tokenizer.batch_decode(out[:, rows.shape[1] :], skip_special_tokens=True)
            _print(prompt, dict(zip(names, answers, strict=True)), args.json)

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
    if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()):
        model.to("cuda")
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


def _print(prompt: str, answers: dict[str | None, str], as_json: bool) -> None:
    if as_json:
        base = {"base": answers[None]} if None in answers else {}
        adapters = {name: text for name, text in answers.items() if name is not None}
        print(json.dumps({"prompt": prompt, **base, "adapters": adapters}, ensure_ascii=False))
        return
    print(f"> {prompt}")
    width = max(len(name or "(base)") for name in answers)
    for name, text in answers.items():
        print(f"{name or '(base)':{width}}  {text}")
    print()
