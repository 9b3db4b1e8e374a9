"""Streams to clients who may leave at any time."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack
from typing import TypeVar

from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptfast.serve.pool import Answer
from gptfast.serve.protocol import ApiError

# An event says all that is new since the last one, and comes no sooner after it: forty a second
# look continuous, and one for each token would cost more than the model.
SECONDS_BETWEEN_EVENTS = 0.025

T = TypeVar("T")


class ClientGone(HTTPException):
    """Nobody is there to be answered; nginx logs such requests as 499."""

    def __init__(self) -> None:
        super().__init__(499, "the client has gone")


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """What the work gives; ClientGone, and the work cancelled, as soon as the client is gone."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def paced(answer: Answer) -> AsyncIterator[list[int]]:
    """The answer's tokens, in lists that are worth an event each."""
    while ids := await answer.more():
        yield ids
        if not answer.over:
            await asyncio.sleep(SECONDS_BETWEEN_EVENTS)


Event = dict | str


class EventStream(Response):
    """Server-sent events, a JSON object or a word each. The answer is left when they or the client
    end."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, first: Event, others: AsyncIterator[Event]) -> None:
        self.status_code = 200
        self.background: BackgroundTask | None = None
        # The second is nginx's: it is not to collect them.
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.answer, self.first, self.others = answer, first, others

    @classmethod
    async def begin(
        cls, request: Request, answer: Answer, events: AsyncIterator[Event]
    ) -> "EventStream":
        """With the first event at hand: what goes wrong before it can still have a status."""
        with ExitStack() as stack:
            stack.enter_context(answer)
            first = await unless_gone(request.receive, anext(events))
            stack.pop_all()
            return cls(answer, first, events)

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        with self.answer:
            try:
                await unless_gone(receive, self._send(send))
            except ClientGone:
                return

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        await send(_chunk(self.first))
        try:
            async for event in self.others:
                await send(_chunk(event))
        except ApiError as error:
            # Too late for a status.
            await send(_chunk(error.body))
        await send({"type": "http.response.body", "body": b""})


def _chunk(event: Event) -> dict:
    data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
    body = f"data: {data}\n\n".encode()
    return {"type": "http.response.body", "body": body, "more_body": True}
