"""The options of the commands, as tables of (option, kind, default, help).

A kind is what makes a value of its text, a list of one such for several values, a tuple of choices,
or None for a switch. A default of ... says that the option must be given. What has no dashes is
given by its place. A text alone is the title of the options that follow.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

Table = tuple[tuple[str, Any, Any, str] | str, ...]
RANKS = ("random", "weight", "activation", "product", "gradient")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _kind(name: str, metavar: str, read: Callable, fits: Callable[[Any], bool]) -> Callable:
    """What argparse calls with a text: the value that `read` makes of it, if it fits."""

    def convert(text: str) -> Any:
        if not fits(value := read(text)):
            raise ValueError
        return value

    convert.__name__, convert.metavar = name, metavar  # type: ignore[attr-defined]
    return convert


def _either(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


COUNT = _kind("count", "N", int, lambda value: value >= 1)
PORT = _kind("port", "N", int, lambda value: 0 <= value < 2**16)
BUDGET = _kind("count or share", "N", _either, lambda value: True)
HELD_OUT = _kind("count or share", "N", _either, lambda x: isinstance(x, int) or 0 <= x < 1)
SHARE = _kind("share above 0", "SHARE", float, lambda value: 0 < value <= 1)
AMOUNT = _kind("positive number", "X", float, lambda value: 0 < value < math.inf)
NOT_NEGATIVE = _kind("number from 0", "X", float, lambda value: 0 <= value < math.inf)
NAMED = _kind("NAME=DIR", "NAME=DIR", lambda text: text.partition("=")[::2], all)


def add(command: argparse.ArgumentParser, table: Table) -> None:
    """Add the options of a table to a parser."""
    group: argparse._ActionsContainer = command
    for row in table:
        if isinstance(row, str):
            group = command.add_argument_group(row)
            continue
        option, kind, default, text = row
        options: dict[str, Any] = {"default": default}
        if default is ...:
            options = {"required": True} if option.startswith("-") else {}
        elif kind is not None and default not in (None, []):
            text = f"{text}; default {default}"
        if kind is None:
            options = {"action": "store_true"}
        elif isinstance(kind, tuple):
            options |= {"choices": kind}
        else:
            if isinstance(kind, list):
                options |= {"action": "extend", "nargs": "+"}
                kind = kind[0]
            known = {Path: "PATH", str: "TEXT", int: "N"}
            options |= {"type": kind, "metavar": known.get(kind) or kind.metavar}
        group.add_argument(option, help=text.replace("%", "%%"), **options)


DEVICE = ("--device", ("auto", "cpu", "cuda"), "auto", "where to compute")
TOKENIZER = ("--tokenizer", str, None, "its folder, or 'bytes'; otherwise that of the model")
TEMPLATES = ("auto", "chat", "alpaca", "none")
_PUT = "how an instruction is put: by the tokenizer's chat template, or Alpaca's prompt"
TEMPLATE = ("--template", TEMPLATES, "auto", _PUT)
_CUT = "tokens of an example; otherwise 512, or the model's limit"
MAX_LENGTH = ("--max-length", COUNT, None, _CUT)
JSON = ("--json", None, False, "as JSON")
BUDGETS: Table = (
    ("--heads", BUDGET, 0.05, "query heads of each attention block: a count, or a share as 0.02"),
    ("--channels", BUDGET, 0.02, "channels of each FFN block, or of each expert, in the same way"),
    ("--granularity", COUNT, 1, "channels lie in aligned runs of so many; 16 suits GPUs"),
    ("--smallest", None, False, "take the smallest scores"),
    ("--scope", ("layer", "global"), "layer", "whether each block has the budget or all compete"),
)
FINETUNE: Table = (
    "model and data",
    ("--model", str, ..., "the base: a folder, or an id on the hub"),
    ("--data", [str], ..., "files, folders, or ids on the hub; see above"),
    ("--output", Path, ..., "a new folder"),
    ("--config", Path, None, "YAML with these options, such as a run's run.yaml; those here win"),
    TOKENIZER,
    TEMPLATE,
    MAX_LENGTH,
    ("--packing", None, False, "join short examples to rows of --max-length"),
    ("--held-out", HELD_OUT, None, "examples to measure the loss on: otherwise 5 %, 128 at most"),
    ("--strict", None, False, "refuse data of which examples would be left out as empty"),
    ("--prompt", [str], [], "instructions: show the answers before and after the training"),
    "method",
    ("--method", ("s2ft", "spiel", "lora"), "s2ft", "what is trained"),
    ("--targets", [str], None, "layers to train: o_proj down_proj in S2FT, else all linear ones"),
    ("--mode", ("auto", "inplace", "additive"), "auto", "how S2FT and SpIEL are applied"),
    ("--seed", int, 0, "of everything drawn"),
    "S2FT",
    *BUDGETS,
    ("--strategy", RANKS, "random", "a draw, or the norms of these, on 1 % of the data"),
    ("--selection", Path, None, "heads and channels of `s2kernels select`, instead of all these"),
    ("--layout", ("auto", "permute", "block", "gather"), "auto", "where trained channels lie"),
    "other methods",
    ("--density", SHARE, 0.01, "of SpIEL: entries trained, as a share of the model's parameters"),
    ("--rank", COUNT, 16, "of LoRA, whose alpha is twice that"),
    ("--beta", AMOUNT, 0.1, "of DPO, for preferences"),
    "training",
    ("--epochs", AMOUNT, 1.0, "times that all data is seen"),
    ("--max-steps", COUNT, None, "instead of --epochs"),
    ("--lr", AMOUNT, 2e-4, "peak learning rate"),
    ("--warmup", NOT_NEGATIVE, 0.0, "steps until the peak, or a share of all if below 1"),
    ("--scheduler", ("linear", "cosine", "constant_with_warmup"), "linear", "after the peak"),
    ("--optimizer", str, "adamw_torch", "any that transformers calls by a name; SpIEL has its own"),
    ("--weight-decay", NOT_NEGATIVE, 0.0, "of what is trained"),
    ("--batch-size", COUNT, 8, "examples, or packed rows, of a batch of each process"),
    ("--accumulate", COUNT, 1, "batches of a step"),
    ("--bf16", None, False, "base in bf16, else fp32; what is trained stays fp32"),
    ("--load-in-4bit", None, False, "base in NF4, by bitsandbytes"),
    ("--load-in-8bit", None, False, "base in int8, by bitsandbytes"),
    ("--gradient-checkpointing", None, False, "less memory, a second forward"),
    ("--save-steps", COUNT, None, "steps between checkpoints: otherwise ten in a run"),
    ("--resume", None, False, "go on from the last checkpoint in --output"),
    DEVICE,
)
EVALUATE: Table = (
    ("--adapter", Path, ..., "of any method"),
    ("--data", [str], ..., "as finetune takes it, but no preferences"),
    ("--model", str, None, "the base: otherwise the one that the adapter names"),
    TOKENIZER,
    ("--template", TEMPLATES, None, "as in finetune: otherwise that of the training"),
    MAX_LENGTH,
    ("--examples", COUNT, 200, "the first so many of the data"),
    ("--max-new-tokens", COUNT, 128, "of an answer"),
    ("--batch-size", COUNT, 8, "examples at a time"),
    ("--bf16", None, False, "base in bf16, else fp32"),
    JSON,
    DEVICE,
)
SELECT: Table = (
    ("--model", Path, ..., "folder of the model"),
    ("--output", Path, ..., "a new file, NAME.json"),
    ("--strategy", RANKS[1:], "weight", "what ranks them; all but weight need --data"),
    *BUDGETS,
    ("--data", [str], None, "as finetune takes it"),
    TOKENIZER,
    TEMPLATE,
    ("--examples", COUNT, 128, "the first so many of the data"),
    MAX_LENGTH,
    DEVICE,
)
ADAPTER = ("adapter", Path, ..., "folder of the adapter")
INSPECT: Table = (ADAPTER, JSON)
_WRITTEN: Table = (
    ADAPTER,
    ("--output", Path, ..., "a new folder"),
    ("--base", str, None, "the base model: otherwise the one that the adapter names"),
)
MERGE: Table = (*_WRITTEN, ("--dtype", DTYPES, "auto", "of the result; auto is that of the base"))
EXPORT: Table = (
    *_WRITTEN,
    ("--format", ("peft", "vllm", "sglang"), "peft", "who is to load it"),
    ("--rank", COUNT, None, "a larger rank than the adapter needs, filled with zeros"),
    ("--check", None, False, "load both with PEFT and print the largest difference in logits"),
)
_SERVED: Table = (
    ("--model", Path, ..., "the base"),
    ("--adapter", [NAMED], [], "S2FT adapters of it"),
    TOKENIZER,
    ("--dtype", DTYPES, "auto", "of the model; auto is that of its files"),
    ("--pool-mib", COUNT, 1024, "device memory for adapters in use"),
    DEVICE,
)
GENERATE: Table = (
    *_SERVED,
    ("--prompt", [str], [], "prompts to continue"),
    ("--prompts", Path, None, "a file of more, one in a line"),
    ("--template", TEMPLATES, "none", "how a prompt is put: as it is, or as an instruction"),
    ("--max-new-tokens", COUNT, 64, "of an answer"),
    ("--temperature", NOT_NEGATIVE, 0.0, "0 is greedy"),
    ("--seed", int, 0, "of what is drawn"),
    ("--json", None, False, "a line of JSON for each prompt"),
)
SERVE: Table = (
    *_SERVED,
    ("--host", str, "127.0.0.1", "address to listen at"),
    ("--port", PORT, 8000, "0 is any that is free"),
    ("--name", str, None, "of the base in requests: otherwise the name of the model's folder"),
    ("--cache-tokens", COUNT, None, "of all requests: otherwise 16384 on a CPU, what fits a GPU"),
)
