"""Tasks and probes, from a folder of JSON files or from the standard library alone.

A file is a list of {"instruction", "input", "output", "answer"}, as the public LLM-Adapters
collection has them. The task "docs" needs no file: a function of the standard library is given, the
first line of its docstring is the answer.
"""

import hashlib
import importlib
import inspect
import json
import random
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bench.demo.corpus import reference_text
from bench.learning.protocol import Protocol

FILES = {
    "math": "math_train.json",
    "easy": "svamp_test.json",
    "hard": "gsm8k_test.json",
    "choice": "arc_easy_train.json",
    "choice test": "arc_easy_test.json",
}
# Modules whose functions and methods are the task "docs".
MODULES = (
    *("argparse", "ast", "asyncio", "base64", "calendar", "collections", "configparser", "copy"),
    *("csv", "datetime", "decimal", "difflib", "email.message", "fractions", "functools", "gzip"),
    *("heapq", "http.client", "inspect", "io", "ipaddress", "itertools", "json", "locale"),
    *("logging", "math", "mimetypes", "operator", "os", "pathlib", "pickle", "platform", "pprint"),
    *("queue", "random", "re", "shutil", "socket", "sqlite3", "statistics", "string", "subprocess"),
    *("tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback", "types"),
    *("typing", "unittest.mock", "urllib.parse", "uuid", "warnings", "weakref", "zipfile"),
)


@dataclass(frozen=True)
class Example:
    """Tokens of a prompt, and those of its answer with the end-of-text token."""

    prompt: list[int]
    answer: list[int]
    expected: str = ""  # what the data say the answer is

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Question:
    """One question with several answers: the tokens of each option, and which one is right."""

    prompt: list[int]
    options: list[list[int]]
    letters: list[int]  # characters of each option
    right: int


@dataclass
class Task:
    train: list[Example]
    validation: list[Example]


@dataclass
class Material:
    """All that a study reads, as tokens. `tests` and `knowledge` are empty without a folder."""

    tasks: dict[str, Task]
    tests: dict[str, list[Example]]
    knowledge: list[Question]
    text: list[list[int]]
    digest: str  # of the files that were read, and of the vocabulary
    notes: dict[str, int] = field(default_factory=dict)  # what was left out


def load(folder: Path | None, tokenizer: Any, protocol: Protocol) -> Material:
    """The material in `folder`, or without one the task "docs" and the text alone.

    Training problems whose text is in a test file are left out, as are problems that are too long.
    Raises ValueError for a file that is missing or not as described.
    """
    tasks, tests, knowledge, notes = {}, {}, [], {}
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    tasks["docs"] = _split(_encode(docs_records(), tokenizer, protocol.longest), protocol)
    if folder is not None:
        records = {}
        for name, file in FILES.items():
            records[name] = _read(folder / file)
            digest.update((folder / file).read_bytes())
        for train, held in (("math", ("easy", "hard")), ("choice", ("choice test",))):
            known = {plain(r["instruction"]) for name in held for r in records[name]}
            clean = [r for r in records[train] if plain(r["instruction"]) not in known]
            notes[f"{train} problems"] = len(records[train])
            notes[f"{train} problems that are in a test"] = len(records[train]) - len(clean)
            examples = _encode(clean, tokenizer, protocol.longest)
            notes[f"{train} problems that are short enough"] = len(examples)
            tasks[train] = _split(examples, protocol)
        for name, key, longest, count in (
            ("easy", "easy", protocol.longest, protocol.easy),
            ("hard", "hard", protocol.longest_hard, protocol.hard),
            ("choice", "choice test", protocol.longest, protocol.choice),
        ):
            tests[name] = _drawn(_encode(records[key], tokenizer, longest), count)
        knowledge = _questions(records["choice test"], tokenizer, protocol)
    ids = tokenizer(reference_text().decode(), add_special_tokens=False)["input_ids"]
    stride = (len(ids) - protocol.window) // protocol.windows
    text = [ids[i * stride :][: protocol.window] for i in range(protocol.windows)]
    digest.update(json.dumps(text).encode())
    return Material(tasks, tests, knowledge, text, digest.hexdigest()[:16], notes)


def encode(record: dict[str, str], tokenizer: Any) -> Example:
    """ "Q: ... A: ..." as tokens; the answer ends with the end-of-text token."""
    question = " ".join(filter(None, (record["instruction"].strip(), record.get("input", ""))))
    answer = record["output"].strip().removeprefix("A:").strip()
    plainly = {"add_special_tokens": False}
    return Example(
        tokenizer(f"Q: {question}\nA:", **plainly)["input_ids"],
        tokenizer(f" {answer}", **plainly)["input_ids"] + [tokenizer.eos_token_id],
        str(record.get("answer", "")),
    )


@cache
def docs_records() -> tuple[dict[str, str], ...]:
    """Functions and methods of MODULES with a docstring, sorted by name."""
    found: dict[str, str] = {}
    for module in MODULES:
        loaded = importlib.import_module(module)
        for name, value in vars(loaded).items():
            if name.startswith("_") or inspect.ismodule(value):
                continue
            places = {name: value}
            if inspect.isclass(value):
                places = {f"{name}.{m}": v for m, v in vars(value).items() if m[0] != "_"}
            for path, thing in places.items():
                if callable(thing) and isinstance(thing.__doc__, str):
                    line = thing.__doc__.strip().partition("\n")[0].strip()
                    if len(line) > 20 and line.endswith("."):
                        found.setdefault(line, f"{module}.{path}")
    return tuple(
        {"instruction": f"What does {name} of Python do?", "output": line, "answer": line}
        for line, name in sorted(found.items(), key=lambda item: item[1])
    )


def plain(text: str) -> str:
    """Letters and digits alone, to compare problems by."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"--data must hold {', '.join(FILES.values())}; {path} is missing")
    records = json.loads(path.read_text())
    wanted = {"instruction", "output", "answer"}
    if not isinstance(records, list) or not all(wanted <= r.keys() for r in records):
        raise ValueError(f"{path} must be a JSON list of objects with {sorted(wanted)}")
    return records


def _encode(records: Any, tokenizer: Any, longest: int) -> list[Example]:
    examples = [encode(record, tokenizer) for record in records]
    return [example for example in examples if len(example) <= longest]


def _drawn(items: list, count: int) -> list:
    """`count` of `items`, the same in every run of every study."""
    if len(items) < count:
        raise ValueError(f"a data file must have {count} short examples, got {len(items)}")
    return random.Random(0).sample(items, count)


def _split(examples: list[Example], protocol: Protocol) -> Task:
    shuffled = _drawn(examples, len(examples))
    needed = protocol.validation + protocol.problems
    if len(shuffled) < needed:
        raise ValueError(f"a task needs {needed} short examples, got {len(shuffled)}")
    return Task(shuffled[protocol.validation :], shuffled[: protocol.validation])


def _questions(records: list[dict], tokenizer: Any, protocol: Protocol) -> list[Question]:
    """Questions with the texts of their answers, from "... Answer1: a Answer2: b ..."."""
    found = []
    for record in records:
        question, *parts = re.split(r"\s*Answer\d: ", record["instruction"])
        if len(parts) < 2 or not re.fullmatch(r"answer\d", record["answer"]):
            continue
        parts[-1] = parts[-1].partition("\n")[0]
        right = int(record["answer"][-1]) - 1
        question = question.partition(": ")[2].strip()
        plainly = {"add_special_tokens": False}
        prompt = tokenizer(f"Q: {question}\nA:", **plainly)["input_ids"]
        options = [tokenizer(f" {part.strip()}", **plainly)["input_ids"] for part in parts]
        longest = len(prompt) + max(map(len, options))
        if all(options) and right < len(options) and longest <= protocol.longest_question:
            found.append(Question(prompt, options, [len(p.strip()) for p in parts], right))
    return _drawn(found, protocol.knowledge)
