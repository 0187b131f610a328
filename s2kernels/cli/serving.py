"""`s2kernels serve` and `s2kernels generate`: one model with any number of adapters."""

import json
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
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
    lines = args.prompts.read_text("utf-8").splitlines() if args.prompts else []
    prompts = [*args.prompt, *filter(str.strip, lines)]
    if not prompts:
        raise ValueError("there is no prompt: --prompt, or a line in the file of --prompts, wanted")
    names = [name for name, _ in args.adapter]
    serving, tokenizer = _load(args)
    encoded = [encode(tokenizer, prompt_of(text, args.template, tokenizer)) for text in prompts]
    if [] in encoded:
        raise ValueError(f"the prompt {prompts[encoded.index([])]!r} has no token")

    def work() -> None:
        torch.manual_seed(args.seed)
        made = partial(serving.generate, adapters=[None, *names])
        for prompt, ids in zip(prompts, encoded, strict=True):
            rows, how = [ids] * (1 + len(names)), (args.max_new_tokens, args.temperature)
            base, *others = answers(made, tokenizer, rows, serving.model.device, *how)
            found = dict(zip(names, others, strict=True))
            if args.json:
                line = {"prompt": prompt, "base": base, "adapters": found}
                print(json.dumps(line, ensure_ascii=False))
            else:
                show(prompt, {"(base)": base, **found})

    return work


def serve(args: Namespace) -> Callable[[], None]:
    """Everything up to the listening socket; serving itself is returned."""
    import uvicorn

    from s2kernels.serve.openai import application
    from s2kernels.serve.sampling import complete, configure

    name = args.name or args.model.resolve().name
    if name in dict(args.adapter):
        raise ValueError(f"--adapter {name}: that is what the base is called; see --name")
    listening = socket.create_server((args.host, args.port))  # raises where it is taken
    serving, tokenizer = _load(args)
    generation = GenerationConfig.from_model_config(serving.model.config)
    generation.eos_token_id = serving.model.generation_config.eos_token_id
    batching = _batching(args.cache_tokens, serving.model.device)
    configure(generation, batching)
    config = serving.model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", sys.maxsize)

    def work() -> None:
        with listening, serving.continuous_batching(generation, batching) as manager:
            complete(manager)
            app = application(serving, manager, tokenizer, name, context)
            host, port = listening.getsockname()[:2]
            print(f"serving {name} and {len(args.adapter)} adapters at http://{host}:{port}/v1")
            sys.stdout.flush()
            how = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS)
            # uvicorn raises the signal that ended it once more; the model is put away first.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with suppress(KeyboardInterrupt):
                uvicorn.Server(how).run(sockets=[listening])

    return work


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
