"""What `s2kernels evaluate` measures: loss and right answers, of an adapter and of its base."""

import tempfile
from argparse import Namespace
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PrinterCallback

from s2kernels.adapter import read_files
from s2kernels.cli import training
from s2kernels.cli.answers import answers, encode, is_right
from s2kernels.cli.examples import for_trainer, read
from s2kernels.cli.models import length_of, load_base, load_tokenizer, with_adapter
from s2kernels.cli.runs import read_settings


def evaluate(args: Namespace) -> dict[str, Any]:
    """The number of examples and of learnt tokens, and for "base" and "adapter" each the `loss`, in
    nats per token, and the number of `right` answers, if the records have a field "answer".

    Raises ValueError or OSError for what does not fit.
    """
    training.without_bars()
    base = args.model or read_files(args.adapter)[0].get("base_model_name_or_path")
    if not base:
        raise ValueError("--model: the adapter does not name its base")
    records, kind, _ = read(args.data, extra=("answer",))
    if kind == "preference":
        raise ValueError("--data: completions wanted, got preferences")
    records = records.select(range(min(args.examples, len(records))))
    folder = args.adapter / "tokenizer_config.json"
    tokenizer = load_tokenizer(args.tokenizer or str(args.adapter if folder.is_file() else base))
    template = args.template or read_settings(args.adapter).get("template", "auto")
    model = load_base(base, torch.bfloat16 if args.bf16 else torch.float32, args.adapter)
    length = length_of(model, args.max_length)
    pairs = for_trainer(records, kind, tokenizer, template, length)
    rows = training.tokenized(tokenizer, pairs, length)
    if not len(rows):
        raise ValueError(f"--max-length {length} leaves no token of any output")
    model = with_adapter(model, args.adapter).eval()
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
            if "answer" in pairs.column_names:
                found[name]["right"] = _right(model, tokenizer, pairs, args)
    return found


def _right(model: Any, tokenizer: Any, pairs: Any, args: Namespace) -> int:
    """How many answers to the prompts are right."""
    right = 0
    for start in range(0, len(pairs), args.batch_size):
        batch = pairs[start : start + args.batch_size]
        prompts = [encode(tokenizer, prompt) for prompt in batch["prompt"]]
        made = answers(model.generate, tokenizer, prompts, model.device, args.max_new_tokens)
        right += sum(map(is_right, made, map(str, batch["answer"])))
    return right
