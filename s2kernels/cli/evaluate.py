"""What `s2kernels evaluate` measures: loss and right answers, of an adapter and of its base."""

import json
import tempfile
from argparse import Namespace
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PrinterCallback

from s2kernels.cli import training
from s2kernels.cli.answers import answers, encode, is_right
from s2kernels.cli.examples import first_completions
from s2kernels.cli.models import base_of, length_of, load_base, load_tokenizer, with_adapter
from s2kernels.cli.runs import read_settings


def evaluate(args: Namespace) -> None:
    """Print the number of examples and of learnt tokens, and of the base and the adapter the loss,
    in nats per token, and the number of right answers, if the records have a field "answer".

    Raises ValueError or OSError for what does not fit.
    """
    base = base_of(args.adapter, args.model)
    training.without_bars()
    records, kind = first_completions(args)
    named = args.adapter if (args.adapter / "tokenizer_config.json").is_file() else base
    tokenizer = load_tokenizer(args.tokenizer or str(named))
    template = args.template or read_settings(args.adapter).get("template", "auto")
    model = load_base(base, torch.bfloat16 if args.bf16 else torch.float32, args.adapter)
    length = length_of(model, args.max_length)
    pairs, rows = training.prepared(records, kind, tokenizer, template, length)
    model = with_adapter(model, args.adapter).eval()
    asked = "answer" in pairs.column_names
    found: dict[str, Any] = {
        "examples": len(pairs),
        "tokens": sum(label != -100 for labels in rows["labels"] for label in labels[1:]),
    }
    with tempfile.TemporaryDirectory() as empty:
        options = training.arguments(empty, args.device, per_device_eval_batch_size=args.batch_size)
        trainer = training.Completions(
            model, options, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
        )
    trainer.remove_callback(PrinterCallback)
    for name, context in (("base", model.disable_adapter), ("adapter", nullcontext)):
        with context():
            found[name] = {"loss": trainer.evaluate()["eval_loss"]}
            if asked:
                found[name]["right"] = _right(model, tokenizer, pairs, args)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['examples']} examples, {found['tokens']:,} tokens learnt of them")
    for name in ("base", "adapter"):
        right = f"   right answers {found[name]['right']} of {found['examples']}" if asked else ""
        print(f"{name:9}loss per token {found[name]['loss']:.4f}{right}")


def _right(model: Any, tokenizer: Any, pairs: Any, args: Namespace) -> int:
    """How many answers to the prompts are right."""
    right = 0
    for batch in pairs.iter(args.batch_size):
        prompts = [encode(tokenizer, prompt) for prompt in batch["prompt"]]
        made = answers(model.generate, tokenizer, prompts, model.device, args.max_new_tokens)
        right += sum(map(is_right, made, map(str, batch["answer"])))
    return right
