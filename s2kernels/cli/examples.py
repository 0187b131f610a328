"""Examples to train on: read from a file, made into tokens and labels, packed, batched.

A record is an instruction with its output, or a text; see `read_records`. An example is what the
model sees of it: `input_ids`, `labels` and, where several share a row, `position_ids`.
"""

import json
import re
from bisect import bisect_left, insort
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FIELDS = ("instruction", "input", "output", "text")
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON may hold one, UTF-8 cannot
IGNORED = -100  # a label that transformers leaves out of the loss

# Those of Stanford Alpaca, so that a model tuned here answers to the prompts of its many kin.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

Example = dict[str, list[int]]


def read_records(path: Path) -> list[dict[str, str]]:
    """The records of a JSON list or of JSON lines.

    Each has `instruction`, `output` and perhaps `input`, or else `text`; other fields are dropped.
    Raises ValueError with the line for anything else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    parse = _parse_list if text.lstrip().startswith("[") else _parse_lines
    records = []
    try:
        for position, record in parse(text):
            fault = _fault(record)
            if fault:
                raise ValueError(f"{path}:{text.count(chr(10), 0, position) + 1}: {fault}")
            records.append({name: record[name] or "" for name in _FIELDS if name in record})
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if not records:
        raise ValueError(f"{path} holds no examples")
    return records


def _parse_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Where each record begins, and the record."""
    position = 0
    for line in text.split("\n"):
        if line.strip():
            try:
                yield position, json.loads(line)
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(error.msg, text, position + error.pos) from None
            except RecursionError:
                raise json.JSONDecodeError("nested too deep", text, position) from None
        position += len(line) + 1


def _parse_list(text: str) -> Iterator[tuple[int, Any]]:
    """The same of a list, element by element: `json.loads` would not tell where each begins."""
    decoder, rest = json.JSONDecoder(), re.compile(r"\S|\Z")

    def skip(position: int) -> int:
        found = rest.search(text, position)
        return found.start() if found else len(text)

    position = skip(skip(0) + 1)
    more = text[position : position + 1] != "]"
    while more:
        try:
            record, end = decoder.raw_decode(text, position)
        except RecursionError:
            raise json.JSONDecodeError("nested too deep", text, position) from None
        yield position, record
        position = skip(end)
        more = text[position : position + 1] == ","
        if more:
            position = skip(position + 1)
    if text[position : position + 1] != "]":
        raise json.JSONDecodeError("',' or ']' expected", text, position)
    if skip(position + 1) < len(text):
        raise json.JSONDecodeError("the list has ended", text, skip(position + 1))


def _fault(record: Any) -> str | None:
    """What is wrong with a record."""
    if not isinstance(record, dict):
        return f"an object wanted, got a {type(record).__name__}"
    needed = ("instruction", "output") if "instruction" in record else ("text",)
    if not set(needed) <= set(record):
        return f"fields 'instruction' and 'output' wanted, or 'text', got {sorted(record)}"
    for name in needed:
        if not isinstance(record[name], str) or not record[name]:
            return f"{name!r} must be a text that is not empty, got {record[name]!r}"
    if not isinstance(record.get("input") or "", str):
        return f"'input' must be a text, got {record['input']!r}"
    for name in _FIELDS:
        if isinstance(record.get(name), str) and _HALF_PAIR.search(record[name]):
            return f"{name!r} holds half a surrogate pair, such as \\ud800, which is no character"
    return None


def encode(record: dict[str, str], tokenizer: Any, max_length: int) -> list[Example]:
    """The examples of a record, each of at most `max_length` tokens, none without a label.

    An instruction gives at most one, cut at its end, labelled on the output and the token after
    it alone. A text gives as many as it takes, labelled on all but their first token, for which
    there is nothing to predict it from.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "instruction" in record:
        start = (PROMPT_WITH_INPUT if record.get("input") else PROMPT).format(**record)
    else:
        start = record["text"]
    ids = tokenizer(start)["input_ids"]
    if end and ids[-1:] == end:
        ids = ids[:-1]
    if "instruction" not in record:
        ids = ids + end
        runs = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        return [{"input_ids": run, "labels": [IGNORED, *run[1:]]} for run in runs if len(run) > 1]
    output = tokenizer(record["output"], add_special_tokens=False)["input_ids"] + end
    if len(ids) >= max_length:
        return []
    labels = [IGNORED] * len(ids) + output
    return [{"input_ids": (ids + output)[:max_length], "labels": labels[:max_length]}]


def pack(examples: list[Example], max_length: int) -> list[Example]:
    """Examples joined to rows of at most `max_length` tokens, longest first, each into the row
    that it fills best. `position_ids` begin anew with each example, which is what keeps them apart
    in attention; the first label of each is ignored, as the token before it is another's.
    """
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
        length = len(example["input_ids"])
        best = bisect_left(room, (length, 0))
        if best == len(room):
            left, row = max_length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(best)
        rows[row].append(example)
        insort(room, (left - length, row))
    return [
        {
            "input_ids": [token for example in row for token in example["input_ids"]],
            "labels": [label for example in row for label in [IGNORED, *example["labels"][1:]]],
            "position_ids": [i for example in row for i in range(len(example["input_ids"]))],
        }
        for row in rows
    ]


def collate(examples: list[Example], pad: int = 0) -> dict[str, Tensor]:
    """A batch, padded on the right. Packed rows have no attention_mask: with one, transformers
    would not look at where their positions begin anew.
    """
    length = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": pad, "labels": IGNORED, "position_ids": 0, "attention_mask": 0}
    if "position_ids" not in examples[0]:
        examples = [
            {**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples
        ]
    return {
        name: torch.tensor(
            [example[name] + [fill[name]] * (length - len(example[name])) for example in examples]
        )
        for name in examples[0]
    }
