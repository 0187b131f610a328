"""Records out of files or the hub, in the shapes that TRL's trainers take."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from s2kernels.cli.answers import check_chat, prompt_of
from s2kernels.cli.models import is_hub_id

SUFFIXES = dict(json="json", jsonl="json", csv="csv", parquet="parquet", txt="text")
# What records hold, by the fields that one must have: the first that fits counts.
FIELDS = {
    "preference": ("chosen", "rejected"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),  # messages in the words of ShareGPT
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
_MORE = {"preference": ("prompt",), "instruction": ("input",), "messages": ("tools",)}
CHATS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}


def sources_of(names: Sequence[str]) -> list[Path | str]:
    """The files that the names are, or that are in the folders they are; what is no path here, of
    the form NAME or OWNER/NAME, as it is, for the hub. Raises ValueError for what is neither.
    """
    found: list[Path | str] = []
    for path in map(Path, names):
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        files = [file for file in files if file.suffix[1:] in SUFFIXES]
        if not path.exists() and not is_hub_id(path):
            raise ValueError(f"{path}: there is no such file or folder")
        if path.exists() and not files:
            raise ValueError(f"{path}: a file .{', .'.join(SUFFIXES)} wanted, or a folder of such")
        found += files or [str(path)]
    return found


def read(
    names: Sequence[str], strict: bool = False, extra: Sequence[str] = ()
) -> tuple[datasets.Dataset, str, int]:
    """The records of files, folders and data sets of the hub; their kind, of FIELDS; and how many
    were left out because a field that a record must have is empty in them.

    extra: further fields to keep. Raises ValueError for a file that cannot be read, a record whose
    field is not what it should be, records of different kinds and, with `strict`, a record that
    would be left out.
    """
    parts, kinds, left_out = [], set(), 0
    for source in sources_of(names):
        whole = _load(source)
        there = set(whole.column_names)
        kind = next((kind for kind, needed in FIELDS.items() if there >= set(needed)), "")
        if not kind:
            wanted = "; or ".join(" and ".join(needed) for needed in FIELDS.values())
            raise ValueError(f"{source}: fields {wanted} wanted, got {sorted(there)}")
        kept = [*FIELDS[kind], *_MORE.get(kind, ()), *extra]
        whole = whole.select_columns([name for name in kept if name in there])
        for name, feature in whole.features.items():  # numbers are texts here
            if getattr(feature, "dtype", "string") not in ("string", "null", "list", "dict"):
                whole = whole.cast_column(name, datasets.Value("string"))
        options = dict(kind=kind, source=str(source), strict=strict)
        part = whole.filter(_is_whole, with_indices=True, fn_kwargs=options)
        left_out += len(whole) - len(part)
        parts.append(part)
        kinds.add(kind)
    if len(kinds) > 1:
        raise ValueError(f"--data: one kind of records wanted, got {', '.join(sorted(kinds))}")
    records = datasets.concatenate_datasets(parts)
    if not len(records):
        raise ValueError(f"{', '.join(names)}: every example has an empty field")
    return records, kinds.pop(), left_out


def first_completions(args: Namespace) -> tuple[datasets.Dataset, str]:
    """The first --examples of --data, and their kind; ValueError for preferences."""
    records, kind, _ = read(args.data, extra=("answer",))
    if kind == "preference":
        raise ValueError("--data: completions wanted, got preferences")
    return records.select(range(min(args.examples, len(records)))), kind


def _load(source: Path | str) -> datasets.Dataset:
    if isinstance(source, str):
        try:
            return datasets.load_dataset(source, split="train")
        except Exception as error:  # of the hub, of its libraries, of the network
            text = " ".join(str(error).split())
            raise ValueError(f"{source}: no file here, and the hub: {text:.200}") from error
    form = SUFFIXES[source.suffix[1:]]
    if not source.read_bytes().strip(b" \t\r\n[]"):
        raise ValueError(f"{source} holds no examples")
    # In CSV an empty text is no gap; each file of plain text is one.
    options: Any = {"csv": {"keep_default_na": False}, "text": {"sample_by": "document"}}
    how = options.get(form, {})
    try:
        return datasets.load_dataset(form, data_files=str(source), split="train", **how)
    except (datasets.exceptions.DatasetGenerationError, ValueError, RecursionError) as error:
        text = _fault_of_json(source) or f"{source}: {error.__cause__ or error}"
        raise ValueError(text) from None


def _fault_of_json(path: Path) -> str | None:
    """The first thing in a file that is not JSON, with its line."""
    text = path.read_text("utf-8", errors="replace") if path.suffix in (".json", ".jsonl") else ""
    lines = [text] if text.lstrip().startswith("[") else text.split("\n")
    for number, part in enumerate(lines, 1):
        try:
            json.loads(part or "0")
        except (json.JSONDecodeError, RecursionError) as error:
            line = number + getattr(error, "lineno", 1) - 1
            return f"{path}:{line}: not JSON: {getattr(error, 'msg', 'nested too deep')}"
    return None


def _is_whole(record: dict[str, Any], number: int, kind: str, source: str, strict: bool) -> bool:
    """Whether no field of the record is empty; ValueError for one of another type."""
    for name in FIELDS[kind]:
        value = record[name]
        if not value or (isinstance(value, str) and not value.strip()):
            if strict:
                raise ValueError(f"{source}: record {number + 1}: {name!r} is empty")
            return False
        turns = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
        of_turns, of_texts = kind not in ("instruction", "text"), name not in CHATS
        if not (turns and of_turns or isinstance(value, str) and of_texts):
            wanted = "a text" if of_texts else "a list of messages"
            raise ValueError(
                f"{source}: record {number + 1}: {name!r} must be {wanted}, got {value!r:.80}"
            )
    return True


def split(records: datasets.Dataset, held_out: float, seed: int) -> tuple[Any, Any]:
    """Training and held-out records; the latter, a share or a count, drawn by `seed`."""
    num = int(held_out) if held_out >= 1 else max(1, round(held_out * len(records)))
    if not held_out:
        return records, records.select([])
    if num >= len(records):
        raise ValueError(f"--held-out {held_out} leaves none of {len(records)} examples to learn")
    parts = records.train_test_split(num, seed=seed)
    return parts["train"], parts["test"]


def for_trainer(
    records: datasets.Dataset, kind: str, tokenizer: Any, template: str, length: int
) -> datasets.Dataset:
    """Records as a trainer of TRL takes them: prompts with completions, preferences, or tokens.

    Of messages every answer of the assistant is an example, with all that came before it as its
    prompt. A text is cut into runs of at most `length` tokens, the last of which ends with the end
    token.
    """
    if kind == "preference":
        return records
    return records.map(
        _runs if kind == "text" else _pairs,
        batched=True,
        remove_columns=records.column_names,
        fn_kwargs=dict(kind=kind, tokenizer=tokenizer, template=template, length=length),
    )


def _runs(batch: dict[str, list], tokenizer: Any, length: int, **_: Any) -> dict[str, list]:
    runs = []
    for ids in tokenizer(batch["text"])["input_ids"]:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = ids if ids[-1:] == end else ids + end
        runs += [ids[i : i + length] for i in range(0, len(ids), length)]
    runs = [run for run in runs if len(run) > 1]
    # A first token has nothing to be predicted from; not every model's loss knows.
    return {"input_ids": runs, "labels": [[-100, *run[1:]] for run in runs]}


def _pairs(
    batch: dict[str, list], kind: str, tokenizer: Any, template: str, length: int
) -> dict[str, list]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    pairs = [pair for row in rows for pair in _pairs_of(row, kind, tokenizer, template)]
    names = ("prompt", "completion", *({"tools", "answer"} & batch.keys()))
    return {name: [pair[name] for pair in pairs] for name in names}


def _pairs_of(row: dict[str, Any], kind: str, tokenizer: Any, template: str) -> list[dict]:
    if kind == "completion":
        if isinstance(row["prompt"], list):
            check_chat(tokenizer)
        return [row]
    if kind == "instruction":
        prompt = prompt_of(row["instruction"], template, tokenizer, row.get("input"))
        # White space before an output would merge with the prompt's last token.
        output: Any = row["output"].lstrip()
        if isinstance(prompt, list):
            output = [{"role": "assistant", "content": output}]
        return [row | {"prompt": prompt, "completion": output}]
    check_chat(tokenizer)
    turns = row[kind]
    if kind == "conversations":
        roles = [_ROLES.get(turn["from"], turn["from"]) for turn in turns]
        turns = [{"role": r, "content": t["value"]} for r, t in zip(roles, turns, strict=True)]
    return [
        row | {"prompt": turns[:i], "completion": [turn]}
        for i, turn in enumerate(turns)
        if i and turn.get("role") == "assistant"
    ]
