"""What a model knows: losses of answers, exact answers, choices, losses of text.

Sequences are packed into rows without padding; `position_ids` that begin anew keep them apart in
attention. Logits are computed at the tokens that count only.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.learning.data import Example, Material, Question
from bench.learning.protocol import Protocol

ROW = 640  # tokens of a row, where a sequence is no longer
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


@dataclass(frozen=True)
class Row:
    """Sequences end to end: ids and positions int64 (1, T); where logits are wanted, what comes
    there and to which sequence it belongs, int64 (labels,) each."""

    ids: Tensor
    positions: Tensor
    keep: Tensor
    labels: Tensor
    owner: Tensor


def row(pairs: Sequence[tuple[list[int], list[int]]], first: int = 0) -> Row:
    """One row of (prompt, answer) pairs; the first answer belongs to sequence `first`.

    An answer's first token is predicted from the last of the prompt, which must not be empty.
    """
    ids, positions, keep, labels, owner = [], [], [], [], []
    for number, (prompt, answer) in enumerate(pairs, start=first):
        begin = len(ids) + len(prompt) - 1
        ids += prompt + answer
        positions += range(len(prompt) + len(answer))
        keep += range(begin, begin + len(answer))
        labels += answer
        owner += [number] * len(answer)
    ids, positions = torch.tensor([ids]), torch.tensor([positions])
    return Row(ids, positions, torch.tensor(keep), torch.tensor(labels), torch.tensor(owner))


def label_logits(model: nn.Module, packed: Row) -> Tensor:
    """What the model says where each label is wanted (labels, vocabulary)."""
    return model(
        input_ids=packed.ids,
        position_ids=packed.positions,
        logits_to_keep=packed.keep,
        use_cache=False,
    ).logits[0]


def token_losses(model: nn.Module, packed: Row) -> Tensor:
    """Cross entropy of each label in nats, fp32 (labels,)."""
    return cross_entropy(label_logits(model, packed).float(), packed.labels, reduction="none")


@torch.no_grad()
def sequence_losses(model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """The summed cross entropy of each answer in nats, fp64 (pairs,)."""
    sums = torch.zeros(len(pairs), dtype=torch.float64)
    for first, part in _rows(pairs):
        packed = row(part, first)
        sums.index_add_(0, packed.owner, token_losses(model, packed).double())
    return sums


def answer_loss(model: nn.Module, examples: Sequence[Example]) -> float:
    """Mean cross entropy of the tokens of all answers, nats per token."""
    sums = sequence_losses(model, [(e.prompt, e.answer) for e in examples])
    return float(sums.sum()) / sum(len(e.answer) for e in examples)


def text_loss(model: nn.Module, windows: Sequence[list[int]]) -> float:
    """Mean cross entropy of all but the first token of each window, nats per token."""
    sums = sequence_losses(model, [(window[:1], window[1:]) for window in windows])
    return float(sums.sum()) / sum(len(window) - 1 for window in windows)


def knowledge(model: nn.Module, questions: Sequence[Question]) -> float:
    """Share of questions whose right answer has the lowest loss per character."""
    pairs = [(q.prompt, option) for q in questions for option in q.options]
    losses = iter(sequence_losses(model, pairs).tolist())
    right = 0
    for question in questions:
        per_letter = [next(losses) / letters for letters in question.letters]
        right += per_letter.index(min(per_letter)) == question.right
    return right / len(questions)


@torch.no_grad()
def choice(model: nn.Module, examples: Sequence[Example], tokenizer: Any) -> float:
    """Share of "... answerN" where N is the most likely of 1 to 4 after the rest of the answer."""
    digits = [tokenizer(str(n), add_special_tokens=False)["input_ids"][-1] for n in range(1, 5)]
    pairs = []
    for example in examples:
        place = max(i for i, token in enumerate(example.answer) if token in digits)
        pairs.append((example.prompt + example.answer[:place], example.answer[place : place + 1]))
    right = 0
    for _, part in _rows(pairs):
        packed = row(part)
        logits = label_logits(model, packed)
        best = torch.tensor(digits)[logits[:, digits].argmax(dim=1)]
        right += int((best == packed.labels).sum())
    return right / len(examples)


@torch.no_grad()
def exact_answers(
    model: nn.Module, examples: Sequence[Example], tokenizer: Any, protocol: Protocol
) -> float:
    """Share of the first examples whose last number, decoded greedily, is the expected one.

    They are decoded in one batch with a KV cache, padded on the left.
    """
    examples = examples[: protocol.decoded]
    longest = max(len(e.prompt) for e in examples)
    pad = tokenizer.eos_token_id
    fill = [longest - len(e.prompt) for e in examples]
    ids = [[pad] * n + e.prompt for n, e in zip(fill, examples, strict=True)]
    mask = [[0] * n + [1] * (longest - n) for n in fill]
    out = model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=protocol.new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    right = [is_answer(text, e.expected) for text, e in zip(texts, examples, strict=True)]
    return sum(right) / len(right)


def is_answer(text: str, expected: str) -> bool:
    """Whether the last number of `text` is `expected`, a number."""
    found = NUMBER.findall(text)
    return bool(found) and abs(float(found[-1].replace(",", "")) - float(expected)) < 1e-4


def evaluate(
    model: nn.Module, material: Material, tokenizer: Any, protocol: Protocol
) -> dict[str, float]:
    """Every measure that the material allows, of the test sets and the probes."""
    tests = material.tests
    found = {"text loss": text_loss(model, material.text)}
    if tests:
        found |= {
            "easy loss": answer_loss(model, tests["easy"]),
            "easy exact": exact_answers(model, tests["easy"], tokenizer, protocol),
            "hard loss": answer_loss(model, tests["hard"]),
            "knowledge": knowledge(model, material.knowledge),
        }
    return found


def _rows(pairs: Sequence[tuple[list[int], list[int]]]) -> Iterable[tuple[int, list]]:
    """Neighbouring pairs as long as they fit into a row, with the number of the first."""
    part: list = []
    first = length = 0
    for number, (prompt, answer) in enumerate(pairs):
        tokens = len(prompt) + len(answer)
        if part and length + tokens > ROW:
            yield first, part
            part, first, length = [], number, 0
        part.append((prompt, answer))
        length += tokens
    if part:
        yield first, part
