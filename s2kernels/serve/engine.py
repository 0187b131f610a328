"""Text out of a running manager, for asyncio: one answer, piece by piece."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from s2kernels.serve.continuous import AdapterManager


@dataclass(frozen=True)
class Question:
    """What is asked: tokens, the adapter (None is the base), and how to go on.

    temperature 0 is greedy. The answer ends before the first of the texts in `stop`.
    """

    tokens: list[int]
    adapter: str | None
    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """Text that follows; the last piece has a reason, "stop" or "length"."""

    text: str
    num_tokens: int
    reason: str | None = None


class Detokenizer:
    """Text of a growing list of tokens: characters that are not whole yet are held back."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._begin = self._end = 0  # of the tokens that the next ones are read together with

    def text(self, tokens: Sequence[int], last: bool) -> str:
        before = self._decode(tokens[self._begin : self._end])
        text = self._decode(tokens[self._begin :])
        if len(text) <= len(before) or (text.endswith("\ufffd") and not last):
            return ""
        self._begin, self._end = self._end, len(tokens)
        return text[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True) if tokens else ""


class StopTexts:
    """Cuts text before the first of some texts; holds back what may be the beginning of one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts, self._held = texts, ""
        self.found = False

    def pass_on(self, text: str, last: bool) -> str:
        self._held += text
        places = [place for stop in self._texts if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = 0
        if not last:
            keep = max((self._overlap(stop) for stop in self._texts), default=0)
        passed, self._held = (
            self._held[: len(self._held) - keep],
            self._held[-keep:] if keep else "",
        )
        return passed

    def _overlap(self, stop: str) -> int:
        """How many of the last characters held are the first ones of `stop`."""
        sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)


async def answer(
    manager: AdapterManager, tokenizer: Any, question: Question
) -> AsyncGenerator[Piece, None]:
    """The pieces of one answer. The request is cancelled if this is closed early.

    Raises ValueError where the manager refuses the request, RuntimeError where it fails.
    """
    request_id = f"req_{uuid.uuid4().hex}"
    outputs: asyncio.Queue = asyncio.Queue()
    ends = manager.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list | tuple) else {ends}
    read, stops = Detokenizer(tokenizer), StopTexts(question.stop)
    manager.register_result_handler(request_id, outputs.put_nowait)
    added = over = False
    try:
        manager.add_request(
            question.tokens,
            request_id,
            question.max_tokens,
            streaming=True,
            adapter=question.adapter,
            temperature=float(question.temperature),
            top_p=float(question.top_p),
        )
        added = True
        while not over:
            output = await outputs.get()
            over = output.is_finished()
            if output.error is not None:
                raise RuntimeError(output.error)
            tokens = output.generated_tokens
            at_end = bool(tokens) and tokens[-1] in ends
            text = stops.pass_on(read.text(tokens[:-1] if at_end else tokens, over), over)
            if over or stops.found:
                reason = "stop" if at_end or stops.found else "length"
                yield Piece(text, len(tokens), reason)
                return
            if text:
                yield Piece(text, len(tokens))
    finally:
        if not added:
            manager.forget_handler(request_id)
        elif not over:  # the handler goes when the loop has heard of it
            manager.cancel_request(request_id)
