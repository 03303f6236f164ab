"""What every request passes first: body limit, API key, counting. One pure ASGI layer, so that streaming
costs nothing.
"""

from __future__ import annotations

import hmac
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from firebox.server import problems
from firebox.server.metrics import Metrics

OPEN_PATHS = frozenset({"/health", "/metrics", "/docs", "/openapi.json"})


class Gate:
    """Reads the whole body (at most `max_body_bytes`) before the app sees the request; all paths but
    OPEN_PATHS need the key.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI app."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = problems.CLIENT_GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.perf_counter() - started)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._may_enter(scope):
            content = problems.body(
                "the API key is missing or wrong", "invalid_request_error", None, "invalid_api_key"
            )
            refusal = problems.response(401, content, {"www-authenticate": "Bearer", "connection": "close"})
            await refusal(scope, receive, send)
            return
        body = await self._read_body(scope, receive)
        if body is None:
            content = problems.body(
                f"the body is larger than {self._max_body_bytes} bytes",
                "invalid_request_error",
                None,
                "body_too_large",
            )
            await problems.response(413, content, {"connection": "close"})(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _may_enter(self, scope: Scope) -> bool:
        if self._authorization is None or scope["path"] in OPEN_PATHS:
            return True
        return hmac.compare_digest(_header(scope, b"authorization") or b"", self._authorization)

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, or None as soon as it is known to be too large."""
        length = _header(scope, b"content-length")
        if length is None and _header(scope, b"transfer-encoding") is None:
            return b""
        if length is not None and length.isdigit() and int(length) > self._max_body_bytes:
            return None
        parts: list[bytes] = []
        size_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b""
            parts.append(message.get("body", b""))
            size_bytes += len(parts[-1])
            if size_bytes > self._max_body_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then whatever comes: the client's leaving."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)
