"""What the routes work with: one engine that reads and writes text, under one name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import Request
from starlette.types import Receive

from firebox.answer import Answer, TextEngine
from firebox.config import Config
from firebox.errors import RequestError, UnknownModelName
from firebox.server.metrics import Metrics
from firebox.server.replies import PromptTokensDetails, Usage


@dataclass(frozen=True)
class Service:
    """The served model. `name`: what requests call it; `created`: the start, in seconds since 1970."""

    text: TextEngine
    config: Config
    name: str
    folder: Path
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    def require_model(self, name: str | None) -> None:
        """Raises UnknownModelName for another model's name; a request that names none means this one."""
        if name is not None and name != self.name:
            raise UnknownModelName(
                f"there is no model {name!r}", param="model", hint=f"this server serves {self.name!r}"
            )


@dataclass(frozen=True)
class ReplyHead:
    """What every chunk and reply to one request begins with."""

    id: str
    created: int
    model: str


def service_of(request: Request) -> Service:
    """The service behind the app that got this request."""
    service = request.app.state.service
    assert isinstance(service, Service), service
    return service


def reply_head(prefix: str, service: Service) -> ReplyHead:
    """A new reply's id ("chatcmpl-…"), time and model."""
    return ReplyHead(f"{prefix}-{uuid4().hex}", int(time.time()), service.name)


def count_usage(prompts: list[list[int]], answers: list[Answer]) -> Usage:
    """Exact counts of a finished request. Its answers come prompt by prompt; the first of each tells what was
    cached.
    """
    prompt_tokens = sum(map(len, prompts))
    completion_tokens = sum(len(answer.ids) for answer in answers)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(answer.cached_tokens for answer in answers[:: len(answers) // len(prompts)])
        ),
    )


async def complete(service: Service, answers: list[Answer]) -> None:
    """Waits for all answers' ends, timing their tokens."""

    async def one(answer: Answer) -> None:
        watch = service.metrics.watch()
        async for piece in answer:
            watch.tokens(len(piece.ids))

    await asyncio.gather(*map(one, answers))


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Does the work, but drops it at once when the client leaves. True if it was done."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def blames(param: str, error: RequestError) -> RequestError:
    """The same error under the field's name in this route: what the engine calls the prompt, a chat calls
    messages.
    """
    if error.param == "prompt":
        error.param = param
    return error
