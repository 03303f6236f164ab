"""The server process from start to end: wait for the engine, open the port, serve, drain, exit.

              engine ready        SIGTERM or SIGINT           all answered, or drain_timeout_s
(loading) ───▶ port opens ───────▶ port closes, answers go on ───────▶ exit 0
                    └─ the engine dies ─▶ 503 for GRACE_S, so that clients and probes see it ─▶ exit 1
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import uvicorn

from firebox.answer import TextEngine, load_text
from firebox.config import Config, ServerConfig
from firebox.engine.client import AsyncEngine, EngineProcess, LoadProgress, Ready
from firebox.server.app import create_app
from firebox.server.listen import url_of
from firebox.server.metrics import Metrics
from firebox.server.service import Service

GRACE_S = 2.0
BACKLOG = 2048
log = logging.getLogger(__name__)


def run(
    process: EngineProcess,
    listener: socket.socket,
    config: Config,
    folder: Path,
    *,
    on_load_progress: Callable[[LoadProgress], None],
    on_ready: Callable[[Ready, str], None],
) -> int:
    """Serves until a signal or the engine's death; returns the exit status. `on_ready` gets the engine and
    the URL.

    Raises what the engine's start-up raises (see AsyncEngine.connect) and CheckpointError for a bad
    tokenizer.
    """
    try:
        return asyncio.run(_run(process, listener, config, folder, on_load_progress, on_ready))
    finally:
        listener.close()
        process.stop()


async def _run(
    process: EngineProcess,
    listener: socket.socket,
    config: Config,
    folder: Path,
    on_load_progress: Callable[[LoadProgress], None],
    on_ready: Callable[[Ready, str], None],
) -> int:
    starting = asyncio.ensure_future(_start(process, config, folder, on_load_progress))
    server: uvicorn.Server | None = None

    def on_signal() -> None:
        if server is None:
            starting.cancel()
        else:
            _end_by_signal(server)

    with _on_signals(on_signal):
        try:
            service = await starting
        except asyncio.CancelledError:  # asked to end while loading: nothing was promised yet
            return 0
        engine = service.text.engine
        if engine.died is not None:  # between its last message and this line
            return 1
        server = http_server(service, config.server)
        engine.on_death = partial(_end_after_death, engine, server)
        listener.listen(BACKLOG)  # from here on clients connect; the server below takes them in
        on_ready(engine.ready, url_of(listener))
        await server.serve(sockets=[listener])
    died = engine.died
    engine.stop()
    return 0 if died is None else 1


async def _start(
    process: EngineProcess, config: Config, folder: Path, on_load_progress: Callable[[LoadProgress], None]
) -> Service:
    dummy = config.model.load_format == "dummy"
    tokenizer, defaults = await asyncio.to_thread(load_text, folder, dummy=dummy)  # while the engine loads
    engine = await AsyncEngine.connect(process, config.server.max_queued_requests, on_load_progress)
    return Service(
        text=TextEngine(engine, tokenizer, defaults),
        config=config,
        name=config.model.served_model_name or Path(config.model.model).name,
        folder=folder,
        metrics=Metrics(engine),
    )


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which ends the process by the signal, not with status 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(service: Service, config: ServerConfig) -> uvicorn.Server:
    """The HTTP server of a service; it serves sockets and ends when `should_exit` is set."""
    return _Server(
        uvicorn.Config(
            create_app(service),
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=config.drain_timeout_s,  # type: ignore[arg-type]  # a float works, and is ours
        )
    )


@contextlib.contextmanager
def _on_signals(handler: Callable[[], object]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _end_by_signal(server: uvicorn.Server) -> None:
    """The first signal drains, a second one ends at once."""
    server.force_exit = server.should_exit
    server.should_exit = True


def _end_after_death(engine: AsyncEngine, server: uvicorn.Server) -> None:
    log.error("error: %s; this server ends in %.0f s", engine.died, GRACE_S)

    def end() -> None:
        server.should_exit = True

    asyncio.get_running_loop().call_later(GRACE_S, end)
