"""Server-sent events: one `data:` line for whatever has arrived for an answer since the last one.

This is the hot path: a chunk is bytes put around the JSON of its text, sent straight to the ASGI server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from firebox.answer import Answer, Piece, aborting
from firebox.errors import FireboxError
from firebox.server import problems
from firebox.server.replies import Usage
from firebox.server.service import ReplyHead, Service, unless_gone

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
to_json = msgspec.json.Encoder().encode


class Chunks(Protocol):
    """One kind of stream: how a piece of the index-th answer looks in it."""

    def choice(self, index: int, answer: Answer, piece: Piece) -> bytes | None:
        """The JSON of the choice, or None when there is nothing to show."""
        ...

    def opening(self) -> bytes:
        """Fields of the first event, as JSON with a comma behind."""
        ...


class EventStream(Response):
    """Streams the answers of one request; a client that leaves ends them. `usage` is asked at the end, if at
    all.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        service: Service,
        head: ReplyHead,
        kind: str,
        answers: list[Answer],
        chunks: Chunks,
        usage: Callable[[], Usage] | None,
    ) -> None:
        super().__init__()
        self._metrics = service.metrics
        self._answers = answers
        self._chunks = chunks
        self._usage = usage
        self._opening = chunks.opening()
        fields = {"id": head.id, "object": kind, "created": head.created, "model": head.model}
        self._before = b"data: " + to_json(fields)[:-1] + b","
        self._after = b"]}\n\n" if usage is None else b'],"usage":null}\n\n'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI response."""
        with aborting(self._answers):
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        try:
            await asyncio.gather(
                *(self._send_one(index, answer, send) for index, answer in enumerate(self._answers))
            )
            last = self._usage_chunk() + DONE
        except (
            FireboxError
        ) as error:  # too late for a status: the stream ends with the error, and without [DONE]
            last = b"data: " + problems.of_error(error)[1] + b"\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_one(self, index: int, answer: Answer, send: Send) -> None:
        watch = self._metrics.watch()
        async for piece in answer:
            watch.tokens(len(piece.ids))
            choice = self._chunks.choice(index, answer, piece)
            if choice is not None:
                opening, self._opening = self._opening, b""
                data = self._before + opening + b'"choices":[' + choice + self._after
                await send({"type": "http.response.body", "body": data, "more_body": True})

    def _usage_chunk(self) -> bytes:
        if self._usage is None:
            return b""
        return self._before + b'"choices":[],"usage":' + self._usage().model_dump_json().encode() + b"}\n\n"
