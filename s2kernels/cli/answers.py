"""What a model is asked and answers, and whether an answer is the right one."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

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


def prompt_of(text: str, template: str, tokenizer: Any, more: str | None = None) -> Any:
    """An instruction as the model is shown it: messages for a chat template, or Alpaca's prompt.

    template: "chat", "alpaca", "none", or "auto": the first where the tokenizer has one, else the
    second. more: further context, the `input` of a record. Raises ValueError for "chat" where
    there is no chat template.
    """
    if template == "none":
        return text
    if template == "chat" or (template == "auto" and tokenizer.chat_template):
        check_chat(tokenizer)
        return [{"role": "user", "content": f"{text}\n\n{more}" if more else text}]
    return (PROMPT_WITH_INPUT if more else PROMPT).format(instruction=text, input=more)


def check_chat(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, which messages need: --tokenizer")


def encode(tokenizer: Any, prompt: Any) -> list[int]:
    """The tokens of a prompt, a text or messages; no end token, which some tokenizers add."""
    if isinstance(prompt, list):
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    ids = tokenizer(prompt)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def answers(
    generate: Callable[..., torch.Tensor],
    tokenizer: Any,
    prompts: Sequence[list[int]],
    device: torch.device,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[str]:
    """The continuations of prompts, in one batch; greedy without a temperature.

    generate: `model.generate`, or what takes the same.
    """
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id or 0
    rows = torch.tensor([[pad] * (length - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    sampling: dict[str, Any] = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    if temperature:
        sampling = dict(do_sample=True, temperature=temperature, top_k=0)
    options = dict(max_new_tokens=max_new_tokens, pad_token_id=pad, use_cache=True, **sampling)
    out = generate(rows.to(device), attention_mask=mask.to(device), **options)
    return tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)


def show(prompt: str, found: dict[str, str]) -> None:
    """Print the answers to a prompt by who gave them."""
    print(f"> {prompt}")
    width = max(map(len, found))
    for name, text in found.items():
        print(f"{name:{width}}  {text.strip()}")
    print()


def is_right(text: str, answer: str) -> bool:
    """Whether a text ends in the answer: a number in its last number, anything else in what stands
    after its last "answer is" or, without one, in all of it. Case, white space and the full stop at
    the end do not count.
    """
    try:
        wanted = float(answer)
    except ValueError:
        said = re.split(r"answer is:?", text.casefold())[-1]
        return said.strip(" \n.") == answer.casefold().strip(" \n.")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == wanted
