"""The endpoints: OpenAI's chat completions, the reference's, the page, and how the server is."""

import asyncio
import base64
import hashlib
import re
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response

from gptfast.conversation import render_messages
from gptfast.engine import STOP_TOKENS, TextStream, generation
from gptfast.engine.calculator import calculate
from gptfast.engine.sampling import Sampling
from gptfast.engine.speech import Piece, Speech, parts_of, text_of
from gptfast.errors import UserError
from gptfast.serve.events import Event, EventStream, paced, unless_gone
from gptfast.serve.guard import Guard
from gptfast.serve.pool import READY, Answer, Pool
from gptfast.serve.protocol import ApiError, ChatRequest, Message
from gptfast.serve.worker import STOP
from gptfast.tokenizer import Tokenizer

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Defaults:
    """For what a request leaves open. UserError for what a request could not ask for."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512

    def __post_init__(self) -> None:
        try:
            ChatRequest(messages=[Message(role="user", content="?")], **asdict(self))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{first['loc'][0]} {first['input']}: {first['msg']}") from error


@dataclass(frozen=True)
class Access:
    """token: what clients must have; None: nothing. local_only: see Guard. origins: whose pages
    browsers may let use this server (CORS); "*" is everybody's."""

    token: str | None = None
    local_only: bool = True
    origins: tuple[str, ...] = ()


def create_app(
    pool: Pool,
    tokenizer: Tokenizer,
    *,
    name: str,
    defaults: Defaults = Defaults(),
    access: Access = Access(),
) -> FastAPI:
    """The application; who starts and closes the pool is gptfast.serve.server.

    name: the model's, as clients see it.
    """
    # No /docs: that page loads its scripts from elsewhere.
    app = FastAPI(title="gptfast", docs_url=None, redoc_url=None)
    chat = Chat(pool, tokenizer, name, defaults)
    app.post("/v1/chat/completions", response_model=None)(chat.openai)
    app.post("/chat/completions", response_model=None)(chat.reference)
    app.get("/v1/models")(chat.models)
    app.get("/v1/models/{model}")(chat.model)
    app.get("/health")(chat.health)
    app.get("/stats")(chat.stats)
    page = page_response()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page

    app.exception_handler(ApiError)(lambda _, error: error.response())
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(RequestValidationError)(_validation_error)
    app.exception_handler(Exception)(_unexpected_error)
    app.add_middleware(Guard, token=access.token, local_only=access.local_only)
    if access.origins:
        # Around the guard: a browser's question beforehand carries no token.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=["GET", "POST"],
            # OpenAI's client sends a dozen of its own.
            allow_headers=["*"],
        )
    return app


class Chat:
    """The endpoints' functions."""

    def __init__(self, pool: Pool, tokenizer: Tokenizer, name: str, defaults: Defaults) -> None:
        self.pool, self.tokenizer, self.name, self.defaults = pool, tokenizer, name, defaults
        self.created = int(time.time())
        self._stop = frozenset(map(tokenizer.special_id, STOP_TOKENS))

    async def openai(self, body: ChatRequest, request: Request) -> Response:
        answer = await self._ask(body)
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.name,
        }
        if body.stream:
            return await EventStream.begin(request, answer, self._events(answer, body, head))
        with answer:
            whole = self._whole(answer, body)
            pieces, completion_tokens, finish = await unless_gone(request.receive, whole)
        message: dict[str, Any] = {"role": "assistant", "content": text_of(pieces)}
        if parts := parts_of(pieces):
            message["parts"] = parts
        return JSONResponse(
            {
                **head,
                "object": "chat.completion",
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": _usage(answer, completion_tokens),
            }
        )

    async def reference(self, body: ChatRequest, request: Request) -> Response:
        """Events {"token", "gpu"}, special tokens spelled, then {"done": true}."""
        answer = await self._ask(body)
        return await EventStream.begin(request, answer, self._reference_events(answer))

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, model: str) -> dict[str, Any]:
        if model != self.name:
            raise ApiError(
                404, f"no model {model!r}; there is {self.name!r}", code="model_not_found"
            )
        return {"id": model, "object": "model", "created": self.created, "owned_by": "gptfast"}

    async def health(self) -> JSONResponse:
        free = sum(len(replica.answers) < self.pool.slots for replica in self.pool.ready)
        ready = bool(self.pool.ready) and self.pool.state == READY
        body = {
            "status": "ok" if ready else self.pool.state,
            "ready": ready,
            "num_gpus": len(self.pool.replicas),
            "available_workers": free,
            "model": self.name,
            "defaults": asdict(self.defaults),
        }
        return JSONResponse(body, 200 if ready else 503)

    async def stats(self) -> dict[str, Any]:
        pool = self.pool
        busy = sum(bool(replica.answers) for replica in pool.ready)
        workers = [
            {
                "gpu_id": replica.number,
                "state": replica.state,
                "device": replica.ready.device if replica.ready else None,
                "running": len(replica.answers),
            }
            for replica in pool.replicas
        ]
        return {
            "total_workers": len(pool.replicas),
            "available_workers": len(pool.ready) - busy,
            "busy_workers": busy,
            "workers": workers,
            "slots": pool.slots * len(pool.ready),
            "running": pool.running,
            "waiting": pool.waiting,
            "answered": pool.answered,
            "cancelled": pool.cancelled,
            "refused": pool.refused,
            "tokens": pool.tokens,
        }

    async def _ask(self, body: ChatRequest) -> Answer:
        body.check()
        context = self.pool.context
        # In another thread: a long conversation takes milliseconds to encode.
        prompt = await asyncio.to_thread(self._prompt, body)
        room = context - len(prompt)
        if room < 1:
            raise ApiError(
                400,
                f"the conversation has {len(prompt):,} tokens; with an answer it can have "
                f"{context:,}: shorten it or begin a new one",
                code="context_length_exceeded",
                param="messages",
            )
        defaults = self.defaults
        sampling = Sampling(
            defaults.temperature if body.temperature is None else body.temperature,
            body.top_k or defaults.top_k,
            body.top_p,
        )
        max_tokens = body.max_completion_tokens or body.max_tokens or defaults.max_tokens
        seed = secrets.randbits(63) if body.seed is None else body.seed
        return self.pool.ask(
            generation.Request(
                prompt, min(max_tokens, room), sampling, seed, self._stop, tool=calculate
            )
        )

    def _prompt(self, body: ChatRequest) -> list[int]:
        try:
            return render_messages(self.tokenizer, [message.plain() for message in body.messages])
        except UserError as error:
            raise ApiError(400, str(error), code="invalid_messages", param="messages") from error

    async def _whole(
        self, answer: Answer, body: ChatRequest
    ) -> tuple[list[Piece], int, str | None]:
        """(pieces, tokens, why it ended)."""
        speech, pieces, tokens = Speech(self.tokenizer, body.stop_strings), [], 0
        async for ids in paced(answer):
            tokens += len(ids)
            pieces += speech.feed(ids)
            if speech.stopped:
                return pieces, tokens, STOP
        return pieces + speech.close(), tokens, answer.finish

    async def _events(self, answer: Answer, body: ChatRequest, head: dict) -> AsyncIterator[Event]:
        head = {**head, "object": "chat.completion.chunk"}
        if body.includes_usage:
            head["usage"] = None
        speech, tokens, role = Speech(self.tokenizer, body.stop_strings), 0, {"role": "assistant"}

        def event(pieces: list[Piece], finish: str | None = None) -> dict:
            delta: dict[str, Any] = dict(role)
            role.clear()
            if pieces or delta:
                delta["content"] = text_of(pieces)
            if parts := parts_of(pieces):
                delta["parts"] = parts
            return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

        async for ids in paced(answer):
            tokens += len(ids)
            pieces = speech.feed(ids)
            if pieces or role:
                yield event(pieces)
            if speech.stopped:
                break
        finish = STOP if speech.stopped else answer.finish
        yield event(speech.close(), finish)
        if body.includes_usage:
            yield {**head, "choices": [], "usage": _usage(answer, tokens)}
        yield "[DONE]"

    async def _reference_events(self, answer: Answer) -> AsyncIterator[Event]:
        text = TextStream(self.tokenizer)
        async for ids in paced(answer):
            if piece := text.feed(ids):
                yield {"token": piece, "gpu": answer.replica}
        if piece := text.close():
            yield {"token": piece, "gpu": answer.replica}
        yield {"done": True}


def _usage(answer: Answer, completion_tokens: int) -> dict[str, int]:
    prompt_tokens = len(answer.request.prompt)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def page_response() -> HTMLResponse:
    """The page, and a policy by which it runs the script and the styles that are in the file and no
    others, loads nothing from anywhere, and cannot make HTML of text at all."""
    html = PAGE.read_text(encoding="utf-8")
    hashes = {
        name: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{name}>(.*?)</{name}>", html, re.DOTALL)
        )
        for name in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(html, headers=headers)


async def _http_error(_: Request, error: HTTPException) -> JSONResponse:
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def _validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json").response()
    path = "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"][1:]
    ).removeprefix(".")
    message = f"{path or 'the body'}: {first['msg']}"
    return ApiError(422, message, code="invalid_value", param=path or None).response()


async def _unexpected_error(_: Request, __: Exception) -> JSONResponse:
    # The server's log has it.
    return ApiError(500, "something went wrong in the server").response()
