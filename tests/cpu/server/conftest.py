"""A real HTTP server on loopback over the fake engine, in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from firebox.answer import TextEngine
from firebox.config import Config, ServerConfig
from firebox.server.listen import bind, url_of
from firebox.server.metrics import Metrics
from firebox.server.run import http_server
from firebox.server.service import Service
from firebox.text.folder import resolve_folder
from firebox.text.tokenizer import Tokenizer
from tests.cpu.server.fake_engine import FakeEngine, Reply

MODEL = "firebox-tiny"


class Served:
    """A running server: `client` talks to it, `engine` is the fake behind it."""

    def __init__(self, url: str, engine: FakeEngine, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = engine
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=20)
        self._loop = loop

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "hi"}], **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, prompt: Any = "hi", **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": prompt, **fields})

    def in_loop(self, act: Callable[[], object]) -> None:
        """Calls in the server's event loop, and waits for it."""

        async def call() -> None:
            act()

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def socket(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=20)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_folder(MODEL))


@pytest.fixture
def serve(tokenizer: Tokenizer) -> Iterator[Callable[..., Served]]:
    """Starts servers that end with the test: `serve(reply, …)` as `serving` does."""
    with contextlib.ExitStack() as stack:
        yield lambda reply, **options: stack.enter_context(serving(tokenizer, reply, **options))


@contextlib.contextmanager
def serving(
    tokenizer: Tokenizer, reply: Reply | None, *, defaults: dict[str, float] | None = None, **options: Any
) -> Iterator[Served]:
    """A running server; fields of ServerConfig go there, the other options to FakeEngine."""
    server_fields = {name: options.pop(name) for name in ("api_key", "max_body_bytes") if name in options}
    config = Config(server=ServerConfig(port=0, **server_fields))
    listener = bind(config.server)
    listener.listen()
    started = threading.Event()
    running: dict[str, Any] = {}

    async def run() -> None:
        engine = FakeEngine(reply, **options)
        text = TextEngine(engine, tokenizer, defaults or {})
        service = Service(text, config, MODEL, resolve_folder(MODEL), Metrics(engine))
        server = http_server(service, config.server)
        running.update(engine=engine, server=server, loop=asyncio.get_running_loop())
        started.set()
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert started.wait(10)
    served = Served(url_of(listener), running["engine"], running["loop"])
    try:
        yield served
    finally:
        served.client.close()
        running["server"].force_exit = running["server"].should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def events(body: str) -> list[Any]:
    """The parsed `data:` lines of an event stream, "[DONE]" as it is."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, after checking its shape."""
    body = response.json()
    assert body.keys() == {"error"}, body
    assert body["error"].keys() == {"message", "type", "param", "code"}, body
    return body["error"]


def says(tokenizer: Tokenizer, text: str, *, ends: bool = True) -> Reply:
    """An engine that answers everything with this text, and then ends, or says it over and over."""
    ids = tokenizer.encode(text)
    return lambda prompt_ids, params: [*ids, 0] if ends else ids * 1000
