"""The order of things at the start and the end of the server process."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

import pytest

from firebox.config import Config, ServerConfig
from firebox.engine.client import AsyncEngine, LoadProgress, Ready
from firebox.errors import ConfigError, OutOfMemory
from firebox.server.listen import bind, url_of
from firebox.server.run import run
from firebox.text.folder import resolve_folder
from tests.cpu.server.conftest import says
from tests.cpu.server.fake_engine import FakeEngine

CONFIG = Config(server=ServerConfig(port=0))
FOLDER = resolve_folder("firebox-tiny")


class NoProcess:
    """Where an engine process would be."""

    stopped = False

    def stop(self) -> int:
        self.stopped = True
        return 0


@pytest.fixture
def start(monkeypatch, tokenizer) -> Callable[..., tuple[int, NoProcess]]:
    """Runs the server over a fake engine, in this thread: (exit status, process)."""

    def started(on_ready: Callable[[Ready, str], None], connect: Callable[[], FakeEngine]):
        async def connecting(process, max_queued, on_load_progress) -> AsyncEngine:
            on_load_progress(LoadProgress(1, 2))
            await asyncio.sleep(0)
            return connect()

        monkeypatch.setattr(AsyncEngine, "connect", connecting)
        process, loaded = NoProcess(), []
        listener = bind(CONFIG.server)
        status = run(process, listener, CONFIG, FOLDER, on_load_progress=loaded.append, on_ready=on_ready)
        assert loaded == [LoadProgress(1, 2)]
        return status, process

    return started


def test_clients_can_connect_when_the_server_says_it_is_ready(start, tokenizer):
    seen: list[str] = []

    def on_ready(ready: Ready, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        socket.create_connection((host, int(port)), timeout=1).close()
        seen.append(ready.model_type)
        signal.raise_signal(signal.SIGTERM)

    status, process = start(on_ready, lambda: FakeEngine(says(tokenizer, "x")))
    assert (status, seen, process.stopped) == (0, ["fake"], True)


def test_an_engine_that_dies_at_once_ends_the_server(start):
    def dead() -> FakeEngine:
        engine = FakeEngine(None)
        engine.die()
        return engine

    assert start(lambda ready, url: pytest.fail("it is not ready"), dead)[0] == 1


def test_start_up_errors_pass_and_the_process_is_stopped(start):
    def fail() -> FakeEngine:
        raise OutOfMemory("too big")

    with pytest.raises(OutOfMemory):
        start(lambda ready, url: None, fail)


def test_a_taken_port_and_a_wrong_host():
    listener = bind(CONFIG.server)
    listener.listen()
    port = int(url_of(listener).rsplit(":", 1)[1])
    for server in (
        ServerConfig(port=port),
        ServerConfig(host="no.such.host.invalid"),
        ServerConfig(port=70_000),
    ):
        with pytest.raises(ConfigError, match=r"cannot listen on|port is 70000"):
            bind(server)
    listener.close()


def test_ipv6_url():
    listener = bind(ServerConfig(host="::1", port=0))
    assert url_of(listener).startswith("http://[::1]:")
    listener.close()
