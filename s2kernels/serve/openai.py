"""Endpoints of OpenAI's API for one model and its adapters, as an application for Starlette.

    GET    /v1/models                the base and the adapters, by the names that "model" takes
    POST   /v1/completions           prompt: a text, tokens, or a list of either
    POST   /v1/chat/completions      messages, for tokenizers with a chat template
    POST   /v1/adapters              {"name": ..., "path": ...} loads one from a folder
    DELETE /v1/adapters/NAME         unloads it; requests that run end with what they began with
    GET    /health

Of the parameters, max_tokens, temperature, top_p, stop and stream are heeded. Those that would
change the answer and are not known are refused. A request that does not fit gets a 4xx that says
why.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from s2kernels.serve.continuous import AdapterManager
from s2kernels.serve.engine import Piece, Question, answer
from s2kernels.serve.questions import chat_prompt, choice, options, prompts
from s2kernels.serve.serving import Serving

MOST_BYTES = 2**22  # of the body of a request
_NAMES = {
    False: ("cmpl", "text_completion", "text_completion"),
    True: ("chatcmpl", "chat.completion", "chat.completion.chunk"),
}


def application(
    serving: Serving, manager: AdapterManager, tokenizer: Any, name: str, context: int
) -> Starlette:
    """name is what the base is called; context how many tokens it was made for."""
    server = _Server(serving, manager, tokenizer, name, min(context, manager.max_request_tokens))
    return Starlette(
        routes=[
            Route("/health", server.health),
            Route("/v1/models", server.models),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/adapters", server.load, methods=["POST"]),
            Route("/v1/adapters/{name:path}", server.unload, methods=["DELETE"]),
        ],
        exception_handlers={HTTPException: _told, Exception: _failed},
    )


class _Server:
    def __init__(
        self, serving: Serving, manager: AdapterManager, tokenizer: Any, name: str, context: int
    ) -> None:
        self.serving, self.manager, self.tokenizer = serving, manager, tokenizer
        self.name, self.context = name, context
        self.began = int(time.time())

    async def health(self, request: Request) -> Response:
        alive = self.manager.is_running()
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        resident = set(self.serving.store.resident())
        base = {"id": self.name, "object": "model", "created": self.began, "owned_by": "s2kernels"}
        adapters = [
            {**base, "id": name, "parent": self.name, "resident": name in resident}
            for name in self.serving.store.names()
        ]
        return JSONResponse({"object": "list", "data": [base, *adapters]})

    async def load(self, request: Request) -> Response:
        body = await _body(request)
        name, path = body.get("name"), body.get("path")
        if not isinstance(name, str) or not name or not isinstance(path, str) or not path:
            raise HTTPException(400, "name and path must be non-empty texts")
        if name == self.name:
            raise HTTPException(400, f"{name!r} is the base")
        try:
            await run_in_threadpool(self.serving.register, name, path)
        except (ValueError, TypeError, OSError) as error:
            raise HTTPException(400, str(error)) from None
        return JSONResponse({"id": name, "parent": self.name})

    async def unload(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            await run_in_threadpool(self.serving.unregister, name)
        except ValueError as error:
            raise HTTPException(404, str(error)) from None
        return JSONResponse({"id": name, "deleted": True})

    async def completions(self, request: Request) -> Response:
        body = await _body(request)
        return await self._respond(request, body, prompts(body, self.tokenizer), chat=False)

    async def chat(self, request: Request) -> Response:
        body = await _body(request)
        tokens = await run_in_threadpool(chat_prompt, body, self.tokenizer)
        return await self._respond(request, body, [tokens], chat=True)

    async def _respond(
        self, request: Request, body: dict[str, Any], tokens: list[list[int]], chat: bool
    ) -> Response:
        model = body.get("model", self.name)
        if model != self.name and model not in self.serving.store.names():
            raise HTTPException(404, f"model {model!r} is neither {self.name!r} nor an adapter")
        adapter = None if model == self.name else model
        asked = [
            Question(ids, adapter, **options(body, len(ids), self.context, chat)) for ids in tokens
        ]
        if not self.manager.is_running():
            raise HTTPException(503, "generation has ended")
        kind, whole, chunk = _NAMES[chat]
        head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        if body.get("stream"):
            if len(asked) > 1:
                raise HTTPException(400, "stream takes a single prompt")
            pieces = answer(self.manager, self.tokenizer, asked[0])
            # The first one here: what is refused is told by the status.
            first = await _first(pieces)
            events = self._events({**head, "object": chunk}, first, pieces, chat)
            return StreamingResponse(events, media_type="text/event-stream")

        answers = await _unless_gone(request, self._all(asked))
        usage = {
            "prompt_tokens": sum(map(len, tokens)),
            "completion_tokens": sum(pieces[-1].num_tokens for pieces in answers),
        }
        usage["total_tokens"] = sum(usage.values())
        found = [
            choice(index, "".join(piece.text for piece in pieces), pieces[-1].reason, chat, False)
            for index, pieces in enumerate(answers)
        ]
        return JSONResponse({**head, "object": whole, "choices": found, "usage": usage})

    async def _all(self, asked: list[Question]) -> list[list[Piece]]:
        async def collect(question: Question) -> list[Piece]:
            async with aclosing(answer(self.manager, self.tokenizer, question)) as pieces:
                return [piece async for piece in pieces]

        tasks = [asyncio.ensure_future(collect(question)) for question in asked]
        try:
            return await asyncio.gather(*tasks)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except RuntimeError as error:
            raise HTTPException(503, str(error)) from None
        finally:
            for task in tasks:
                task.cancel()

    async def _events(
        self, head: dict[str, Any], first: Piece, rest: AsyncGenerator[Piece, None], chat: bool
    ) -> AsyncIterator[str]:
        async with aclosing(rest):
            yield _event({**head, "choices": [choice(0, first.text, first.reason, chat, True)]})
            try:
                async for piece in rest:
                    found = choice(0, piece.text, piece.reason, chat, True)
                    yield _event({**head, "choices": [found]})
            except RuntimeError as error:
                yield _event({"error": _error(str(error), 503)})
        yield "data: [DONE]\n\n"


async def _first(pieces: AsyncIterator[Piece]) -> Piece:
    try:
        return await anext(pieces)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    except RuntimeError as error:
        raise HTTPException(503, str(error)) from None


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled if the client goes."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=0.2)
            if not task.done() and await request.is_disconnected():
                raise HTTPException(499, "the client is gone")
        return task.result()
    finally:
        task.cancel()


async def _body(request: Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no page of another site can send without being allowed
        raise HTTPException(415, f"the content type must be application/json, got {kind!r}")
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MOST_BYTES:
            raise HTTPException(413, f"a request may have {MOST_BYTES} bytes")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return body


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _error(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": None, "code": status}


def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    content = {"error": _error(error.detail, error.status_code)}
    return JSONResponse(content, error.status_code, headers=error.headers)


def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": _error(f"{type(error).__name__}: {error}", 500)}, 500)
