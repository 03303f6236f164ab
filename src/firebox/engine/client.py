"""The engine as the server and the offline API see it: submit token ids, iterate over deltas.

An engine process is started with `EngineProcess`, which costs nothing but a fork, so that its imports and its
loading run beside the caller's own start-up; `AsyncEngine.connect` then waits until it is ready. The two
processes speak the messages of `engine.messages` over two ZeroMQ sockets in a private folder. Each binds
where it listens and connects where it speaks, so that whichever comes first loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable

import msgspec
import zmq

import firebox.errors
from firebox.config import Config
from firebox.engine.limits import validate
from firebox.engine.messages import (
    Abort,
    Captured,
    Delta,
    Drain,
    Failed,
    FromEngine,
    Generate,
    LedgerRow,
    LoadProgress,
    Memory,
    Outputs,
    Progress,
    Ready,
    SamplingParams,
    Stats,
    ToEngine,
    TokenLogprobs,
)
from firebox.errors import ConfigError, EngineDied, FireboxError, QueueFull

__all__ = [
    "AsyncEngine",
    "Captured",
    "Delta",
    "EngineProcess",
    "LedgerRow",
    "LoadProgress",
    "Memory",
    "Progress",
    "Ready",
    "RequestStream",
    "SamplingParams",
    "Stats",
    "TokenLogprobs",
]


LONGEST_PLACE = 70  # characters of the folder in which the sockets' own lies; a socket's path may have 107


def _folder() -> str:
    """Where the sockets lie: in TMPDIR, unless its path is too long for one."""
    place = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="firebox-", dir=place if len(place) <= LONGEST_PLACE else "/tmp")


class EngineProcess:
    """One engine process and the sockets to it. `start` returns at once; loading goes on in the process."""

    def __init__(self, process: subprocess.Popen[bytes], folder: str, alive_fd: int) -> None:
        self.process = process
        self.folder = folder
        self._alive_fd: int | None = alive_fd

    @classmethod
    def start(cls, config: Config) -> EngineProcess:
        """Starts `python -m firebox.engine`. It ends by itself when this process does: it watches a pipe held
        here."""
        folder = _folder()
        with open(os.path.join(folder, "config.json"), "wb") as file:
            file.write(msgspec.json.encode(config))
        watch_fd, alive_fd = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "firebox.engine", folder, str(watch_fd)],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            pass_fds=(watch_fd,),
            start_new_session=True,  # a Ctrl-C at the terminal reaches the server, which then drains
        )
        os.close(watch_fd)
        return cls(process, folder, alive_fd)

    def address(self, direction: str) -> str:
        """The ZeroMQ endpoint of one direction: "to-engine" or "from-engine"."""
        return f"ipc://{self.folder}/{direction}"

    def stop(self, timeout_s: float = 5.0) -> int:
        """Ends the process, by force after `timeout_s`, removes the folder and returns the exit status.
        Harmless twice."""
        if self._alive_fd is not None:
            os.close(self._alive_fd)
            self._alive_fd = None
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        return status


class RequestStream:
    """One submitted request: `async for delta in stream`. Leaving early must be followed by `abort()`."""

    def __init__(self, engine: AsyncEngine, request_id: int, params: SamplingParams) -> None:
        self.request_id = request_id
        self.params = params
        self.finished = False
        self.progress: Progress | None = None
        self._engine = engine
        self._deltas: list[Delta] = []
        self._arrived = asyncio.Event()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Delta:
        """The next delta. Raises EngineDied if the engine process ended before the request did."""
        await self._some()
        return self._deltas.pop(0)

    async def next_deltas(self) -> list[Delta]:
        """All deltas that have arrived, at least one; ends and raises as `__anext__` does."""
        await self._some()
        deltas, self._deltas = self._deltas, []
        return deltas

    async def _some(self) -> None:
        while not self._deltas:
            if self.finished:
                raise StopAsyncIteration
            self._engine.raise_if_dead()
            self._arrived.clear()
            await self._arrived.wait()

    def abort(self) -> None:
        """Frees the request's pages within a step. Harmless when it has already finished."""
        if not self.finished:
            self.finished = True
            self._engine.forget(self.request_id)

    def _put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self.finished = delta.finish_reason is not None
        self._arrived.set()


class AsyncEngine:
    """The client side of one engine process. All methods belong to one event loop."""

    def __init__(self, process: EngineProcess, max_queued_requests: int) -> None:
        self.stats = Stats()
        self.captured: dict[int, Captured] = {}  # batch size → its graph, or why it has none
        self.ready: Ready
        self.died: EngineDied | None = None
        self.on_death: Callable[[], None] = lambda: None
        self._process = process
        self._max_queued_requests = max_queued_requests
        self._streams: dict[int, RequestStream] = {}
        self._next_id = 0
        self._stopping = False
        self._is_ready, self._last_words = False, ""
        self._starting: asyncio.Queue[Ready | Failed | LoadProgress | EngineDied] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._out = self._context.socket(zmq.PUSH)
        self._in = self._context.socket(zmq.PULL)
        for socket in (self._out, self._in):
            socket.set_hwm(0)  # backpressure is max_queued_requests, not a dropped message
            socket.setsockopt(zmq.LINGER, 0)
        # A connected socket keeps what is sent until it is taken; a bound one without a peer refuses it.
        self._out.connect(process.address("to-engine"))
        self._in.bind(process.address("from-engine"))
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        # zmq.asyncio would cost several times what reading the socket's own file descriptor does
        self._loop.add_reader(self._in.FD, self._read)

    @classmethod
    async def connect(
        cls,
        process: EngineProcess,
        max_queued_requests: int,
        on_load_progress: Callable[[LoadProgress], None] = lambda progress: None,
    ) -> AsyncEngine:
        """Waits until the process is ready. Raises the user's mistake it met (see errors.py), or
        EngineDied."""
        engine = cls(process, max_queued_requests)
        engine._watch_process()
        while True:
            message = await engine._starting.get()
            if isinstance(message, Ready):
                engine.ready, engine._is_ready = message, True
                engine._note(message.captured)
                engine.stats = Stats(kv_pages_total=message.kv_pages, kv_pages_free=message.kv_pages)
                return engine
            if isinstance(message, LoadProgress):
                on_load_progress(message)
                continue
            engine.stop()
            if isinstance(message, Failed):
                raise _as_error(message)
            raise message

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet finished."""
        return len(self._streams)

    def require_room(self, requests: int) -> None:
        """Raises QueueFull if that many more requests do not fit running plus queued, EngineDied if nothing
        can run."""
        self.raise_if_dead()
        limit = self.ready.max_running_requests + self._max_queued_requests
        if self.in_flight + requests > limit:
            raise QueueFull(f"{self.in_flight} requests are in flight; the limit is {limit}", retry_after_s=1)

    def submit(self, prompt_ids: list[int], params: SamplingParams, priority: int = 0) -> RequestStream:
        """Queues one request. Raises RequestError for wrong values, QueueFull, EngineDied."""
        params = validate(prompt_ids, params, self.ready)
        self.require_room(1)
        stream = RequestStream(self, self._next_id, params)
        self._next_id += 1
        self._streams[stream.request_id] = stream
        self._send(Generate(stream.request_id, prompt_ids, params, priority))
        return stream

    def forget(self, request_id: int) -> None:
        """Aborts one request by id; RequestStream.abort is the usual way."""
        if self._streams.pop(request_id, None) is not None and self.died is None:
            self._send(Abort([request_id]))

    def raise_if_dead(self) -> None:
        """Raises EngineDied once the engine process has ended."""
        if self.died is not None:
            raise EngineDied(str(self.died))

    def stop(self) -> int:
        """Ends the engine process and closes the sockets. Returns the process's exit status."""
        self._stopping = True
        if self.died is None:
            self._send(Drain())
        self._loop.remove_reader(self._in.FD)
        status = self._process.stop()
        self._context.destroy(linger=0)
        return status

    def _send(self, message: ToEngine) -> None:
        self._out.send(self._encoder.encode(message), zmq.NOBLOCK)

    def _read(self) -> None:
        """Takes in every message that has arrived: the descriptor tells only of new ones."""
        while True:
            try:
                message = self._decoder.decode(self._in.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            if isinstance(message, Outputs):
                self._take(message)
            elif isinstance(message, Failed) and self._is_ready:
                self._last_words = f": {message.message}"
            else:
                self._starting.put_nowait(message)

    def _take(self, message: Outputs) -> None:
        self.stats = message.stats
        self._note(message.captured)
        for progress in message.progress:
            if stream := self._streams.get(progress.request_id):
                stream.progress = progress
        for delta in message.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:  # aborted here while the step was under way
                continue
            if delta.finish_reason is not None:
                del self._streams[delta.request_id]
            stream._put(delta)

    def _note(self, captured: Iterable[Captured]) -> None:
        self.captured |= {graph.requests: graph for graph in captured}

    def _watch_process(self) -> None:
        def wait() -> None:
            status = self._process.process.wait()
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is waiting any more
                self._loop.call_soon_threadsafe(self._on_exit, status)

        threading.Thread(target=wait, name="engine-watch", daemon=True).start()

    def _on_exit(self, status: int) -> None:
        if self._stopping:
            return
        self._read()  # its last words
        self.died = EngineDied(f"the engine process ended with status {status}{self._last_words}")
        self._starting.put_nowait(self.died)
        for stream in self._streams.values():
            stream._arrived.set()
        self.on_death()


def _as_error(failed: Failed) -> FireboxError:
    """The engine's start-up error, as the class it had there (errors with more arguments than a message
    become ConfigError)."""
    kind = getattr(firebox.errors, failed.error, ConfigError)
    if not issubclass(kind, FireboxError):
        kind = ConfigError
    return kind(failed.message, hint=failed.hint)
