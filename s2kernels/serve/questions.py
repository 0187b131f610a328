"""What a body of OpenAI's API asks for, checked; HTTPException with 400 where it does not fit."""

import math
from typing import Any

from starlette.exceptions import HTTPException

# Neutral values of what is not done here: anything else would change the answer, and is refused.
_UNSUPPORTED: dict[str, tuple] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "seed": (None,),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}
_DEFAULT_TOKENS = {False: 16, True: 256}
_MOST_STOPS = 16


def prompts(body: dict[str, Any], tokenizer: Any) -> list[list[int]]:
    """The tokens of each prompt."""
    given = body.get("prompt")
    if isinstance(given, str) or _is_tokens(given):
        given = [given]
    if not isinstance(given, list) or not given:
        raise HTTPException(400, "prompt must be a text, tokens, or a non-empty list of either")
    found = []
    for prompt in given:
        if isinstance(prompt, str):
            tokens = list(tokenizer(prompt)["input_ids"])
        elif _is_tokens(prompt):
            tokens = prompt
        else:
            raise HTTPException(400, "prompt must be a text, tokens, or a list of either")
        if not tokens:
            raise HTTPException(400, "prompt must have at least one token")
        found.append(tokens)
    return found


def chat_prompt(body: dict[str, Any], tokenizer: Any) -> list[int]:
    """The tokens of `messages`, with what begins an answer."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise HTTPException(400, "messages must be a non-empty list")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(field), str) for field in ("role", "content")
        ):
            raise HTTPException(400, "messages must have a role and a content, both texts")
    if getattr(tokenizer, "chat_template", None) is None:
        raise HTTPException(400, "the tokenizer has no chat template: use /v1/completions")
    try:
        found = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # whatever a template raises
        raise HTTPException(400, f"messages: {error}") from None
    return list(found)


def options(body: dict[str, Any], length: int, context: int, chat: bool) -> dict[str, Any]:
    """max_tokens, temperature, top_p and stop, for a prompt of so many tokens."""
    for name, neutral in _UNSUPPORTED.items():
        if body.get(name) not in neutral:
            raise HTTPException(400, f"{name} is not supported, got {body[name]!r}")
    if body.get("stream") not in (None, True, False):
        raise HTTPException(400, f"stream must be true or false, got {body['stream']!r}")
    room = context - length
    default = max(1, min(_DEFAULT_TOKENS[chat], room))
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    most = body.get(name)
    most = default if most is None else most
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise HTTPException(400, f"{name} must be a positive integer, got {most!r}")
    if most > room:
        raise HTTPException(
            400, f"prompt and {name} must be at most {context} tokens, got {length} and {most}"
        )
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > _MOST_STOPS
        or not all(isinstance(text, str) and text for text in stops)
    ):
        raise HTTPException(400, f"stop must be a text or up to {_MOST_STOPS}, got {stop!r}")
    return {
        "max_tokens": most,
        "temperature": _number(body, "temperature", 0.0, 2.0),
        "top_p": _number(body, "top_p", 1e-6, 1.0),
        "stop": tuple(stops),
    }


def choice(index: int, text: str, reason: str | None, chat: bool, stream: bool) -> dict[str, Any]:
    """One of the choices of a response."""
    message = {"role": "assistant", "content": text}
    content = {"delta" if stream else "message": message} if chat else {"text": text}
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def _number(body: dict[str, Any], name: str, low: float, high: float) -> float:
    value = body.get(name)
    value = 1.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise HTTPException(400, f"{name} must be a number, got {value!r}")
    if not low <= value <= high:
        raise HTTPException(400, f"{name} must lie in [{low:g}, {high:g}], got {value!r}")
    return float(value)


def _is_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
        and min(value) >= 0
    )
