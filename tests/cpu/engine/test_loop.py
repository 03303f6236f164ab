"""The engine's loop over real sockets: in a thread of this process, then as the process a server starts."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from firebox.cache.kv_cache import CacheSizes, KVCache
from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine.__main__ import main as engine_main
from firebox.engine.client import AsyncEngine, EngineProcess, LoadProgress, RequestStream
from firebox.engine.loop import Connection, run
from firebox.engine.messages import (
    Abort,
    Captured,
    Drain,
    Failed,
    FromEngine,
    Generate,
    Outputs,
    SamplingParams,
    Stats,
    ToEngine,
)
from firebox.engine.runner import Runner
from firebox.engine.scheduler import Plan, Sampled, Scheduler
from firebox.errors import (
    CheckpointError,
    ConfigError,
    EngineDied,
    FireboxError,
    MissingTensor,
    OutOfMemory,
    QueueFull,
    UnsupportedModel,
)
from firebox.find import load, names
from firebox.weights.checkpoint import open_checkpoint
from tests.support.checkpoints import write_checkpoint
from tests.support.engine import GREEDY, InProcessEngine

TINY = load("models", "glm4_moe").TINY
PAGES = 32
PROMPT = [5, 17, 200, 3, 99, 12, 80]
LONG = replace(GREEDY, max_tokens=400)
VERY_LONG = replace(GREEDY, max_tokens=3900)


def dummy_folder(folder: Path) -> Path:
    """A model folder without weights; they are random."""
    (folder / "config.json").write_text(json.dumps(TINY | {"max_position_embeddings": 4096}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InProcessEngine:
    folder = dummy_folder(tmp_path_factory.mktemp("model"))
    return InProcessEngine(folder, load_format="dummy", kv_pages=PAGES)


def make_scheduler(model: InProcessEngine) -> Scheduler:
    """Over empty pages, nothing kept for later: a page is free unless a running request holds it."""
    return Scheduler(
        KVCache(CacheSizes(PAGES, model.ready.page_tokens), prefix_cache=False),
        max_running_requests=8,
        max_batch_tokens=512,
        prefill_chunk_tokens=16,
        eos_token_ids=frozenset(),
    )


class Paced:
    """A runner that can be held: then each step waits until it is allowed."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self.steps = runner, runner.steps
        self._permits: threading.Semaphore | None = None

    def hold(self) -> None:
        self._permits = threading.Semaphore(0)

    def allow(self, steps: int) -> None:
        assert self._permits is not None
        self._permits.release(steps)

    def let_go(self) -> None:
        permits, self._permits = self._permits, None
        if permits is not None:
            permits.release(1000)

    def may_overlap(self, plan: Plan) -> bool:
        return False

    def news(self) -> list[Captured]:
        return self._runner.news()

    def run(self, plan: Plan) -> list[Sampled]:
        permits = self._permits
        assert permits is None or permits.acquire(timeout=20)
        return self._runner.run(plan)


class Loop:
    """`engine.loop.run` in a thread, and the server's ends of its sockets and pipe."""

    def __init__(self, model: InProcessEngine, folder: Path) -> None:
        self._context = zmq.Context()
        self._out, self._in = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        self._out.connect(f"ipc://{folder}/to-engine")
        self._in.bind(f"ipc://{folder}/from-engine")
        self._watch_fd, self.alive_fd = os.pipe()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self.raised: BaseException | None = None
        self.scheduler, self.runner = make_scheduler(model), Paced(model.runner)
        self._connection = Connection(str(folder), self._watch_fd)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            run(self._connection, self.scheduler, self.runner)  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001 (handed to the test)
            self.raised = error
        self._connection.close()

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            self._out.send(msgspec.msgpack.encode(message))

    def receive(self) -> Outputs:
        assert self._in.poll(20_000), "the engine said nothing for 20 seconds"
        message = self._decoder.decode(self._in.recv())
        assert isinstance(message, Outputs)
        return message

    def until(self, reached: Callable[[Outputs], bool]) -> list[Outputs]:
        """Messages up to the one that `reached` is true of."""
        found = [self.receive()]
        while not reached(found[-1]):
            found.append(self.receive())
        return found

    def settle(self) -> list[Outputs]:
        """Waits until everything sent has arrived and nothing more comes back."""
        found = []
        while self._in.poll(200):
            found.append(self.receive())
        return found

    def rest(self) -> list[Outputs]:
        """What is still on its way once the loop has returned."""
        self.thread.join(20)
        assert not self.thread.is_alive(), "the loop goes on"
        found = []
        while self._in.poll(0):
            found.append(self.receive())
        return found

    def hang_up(self) -> None:
        """What the kernel does when the server process ends."""
        if self.alive_fd >= 0:
            os.close(self.alive_fd)
            self.alive_fd = -1

    def close(self) -> None:
        self.hang_up()
        self.runner.let_go()
        self.thread.join(20)
        os.close(self._watch_fd)
        self._context.destroy(linger=0)
        assert not self.thread.is_alive()


@pytest.fixture
def loop(model: InProcessEngine, tmp_path: Path) -> Iterator[Loop]:
    made = Loop(model, tmp_path)
    yield made
    made.close()


def ids_of(messages: list[Outputs], request_id: int) -> list[int]:
    return [
        token for m in messages for delta in m.deltas if delta.request_id == request_id for token in delta.ids
    ]


def finished(*request_ids: int) -> Callable[[Outputs], bool]:
    """True once all of these requests have finished."""
    left = set(request_ids)

    def reached(message: Outputs) -> bool:
        left.difference_update(delta.request_id for delta in message.deltas if delta.finish_reason)
        return not left

    return reached


# ---- in a thread


def test_a_request_comes_back_token_by_token(loop: Loop, model: InProcessEngine) -> None:
    model.restart(prefill_chunk_tokens=512)
    (expected,) = model.generate([PROMPT])
    loop.send(Generate(7, PROMPT, GREEDY))
    messages = loop.until(finished(7))
    assert ids_of(messages, 7) == expected and len(expected) == GREEDY.max_tokens
    deltas = [delta for message in messages for delta in message.deltas]
    assert [len(delta.ids) for delta in deltas] == [1] * len(expected), "one delta a step"
    assert [delta.finish_reason for delta in deltas] == [None] * (len(expected) - 1) + ["length"]
    assert [delta.cached_tokens for delta in deltas] == [0] + [None] * (len(expected) - 1)


def test_stats_grow_with_every_step_and_settle(loop: Loop) -> None:
    loop.send(Generate(1, PROMPT, GREEDY), Generate(2, PROMPT[:3], GREEDY))
    messages = loop.until(finished(1, 2))
    stats = [message.stats for message in messages]
    assert [s.steps for s in stats] == list(range(1, len(stats) + 1))
    before = stats[0].step_modes["eager/no graphs on a CPU"]  # the module's model has served other tests
    assert [s.step_modes["eager/no graphs on a CPU"] - before for s in stats] == list(range(len(stats)))
    for earlier, later in pairwise(stats):
        assert (
            later.generated_tokens >= earlier.generated_tokens and later.step_seconds > earlier.step_seconds
        )
    last = stats[-1]
    assert (last.running_requests, last.waiting_requests, last.finished_requests) == (0, 0, 2)
    assert (last.prompt_tokens, last.generated_tokens) == (10, 48)
    assert last.kv_pages_free == last.kv_pages_total == PAGES


def test_a_long_prompt_reports_its_progress(loop: Loop) -> None:
    loop.send(Generate(3, [i % 300 + 1 for i in range(50)], replace(GREEDY, max_tokens=2)))
    messages = loop.until(finished(3))
    progress = [
        (p.request_id, p.computed_tokens, p.prompt_tokens) for message in messages for p in message.progress
    ]
    assert progress == [(3, 16, 50), (3, 32, 50), (3, 48, 50)]


def test_an_abort_frees_the_pages_within_a_step(loop: Loop) -> None:
    loop.runner.hold()
    loop.send(Generate(1, PROMPT * 10, LONG), Generate(2, PROMPT, LONG))
    loop.settle()
    loop.runner.allow(20)
    messages = loop.settle()
    assert messages[-1].stats.running_requests == 2 and messages[-1].stats.generated_tokens > 20
    loop.send(Abort([1]))
    assert not loop.settle()
    loop.runner.let_go()
    under_way, after = loop.receive(), loop.receive()
    assert under_way.stats.aborted_requests == 0
    assert (after.stats.aborted_requests, after.stats.running_requests) == (1, 1)
    assert ids_of([after], 1) == [] and len(ids_of([after], 2)) == 1
    computed_tokens = len(PROMPT) + len(ids_of([*messages, under_way, after], 2)) - 1
    assert after.stats.kv_pages_free == PAGES - -(-computed_tokens // 16)
    loop.send(Abort([2, 99]))  # 99 is unknown: it may just have finished
    last = loop.until(lambda message: message.stats.running_requests == 0)[-1]
    assert (last.stats.aborted_requests, last.stats.kv_pages_free) == (2, PAGES)


def test_an_abort_of_what_waits(loop: Loop) -> None:
    loop.runner.hold()
    loop.send(*(Generate(i, PROMPT, LONG) for i in range(9)))  # eight may run
    loop.settle()
    loop.runner.allow(2)  # the first step began before all had come
    assert loop.settle()[-1].stats.waiting_requests == 1
    loop.send(Abort([8]))
    loop.settle()
    loop.runner.allow(2)
    stats = loop.settle()[-1].stats
    assert (stats.waiting_requests, stats.running_requests, stats.aborted_requests) == (0, 8, 1)
    loop.send(Abort(list(range(8))))
    loop.runner.let_go()
    stats = loop.until(lambda message: message.stats.running_requests == 0)[-1].stats
    assert (stats.aborted_requests, stats.kv_pages_free) == (9, PAGES)


def test_drain_finishes_what_is_queued_and_returns(loop: Loop) -> None:
    loop.runner.hold()
    loop.send(*(Generate(i, [i + 1, *PROMPT], GREEDY) for i in range(12)), Drain())
    loop.settle()
    loop.runner.let_go()
    messages = loop.rest()
    assert loop.raised is None
    assert all(len(ids_of(messages, i)) == GREEDY.max_tokens for i in range(12))
    assert messages[-1].stats.finished_requests == 12


def test_drain_of_an_idle_engine_returns_at_once(loop: Loop) -> None:
    loop.send(Drain())
    loop.rest()
    assert loop.raised is None


@pytest.mark.parametrize("busy", [False, True])
def test_the_loop_ends_when_the_server_is_gone(loop: Loop, busy: bool) -> None:
    loop.runner.hold()
    if busy:
        loop.send(Generate(1, PROMPT, LONG))
    loop.settle()
    loop.hang_up()
    if busy:
        loop.runner.allow(1)  # the step under way is the last
    loop.thread.join(20)
    assert isinstance(loop.raised, EOFError)


def test_priority_and_params_reach_the_scheduler(loop: Loop) -> None:
    loop.runner.hold()
    params = SamplingParams(
        max_tokens=4, temperature=0.7, seed=3, top_k=7, logit_bias={5: 1.5}, stop_token_ids=(9,)
    )
    loop.send(Generate(4, PROMPT, params, priority=2))
    loop.settle()
    (request,) = loop.scheduler._requests.values()
    assert (request.request_id, request.token_ids, request.priority, request.params) == (4, PROMPT, 2, params)


# ---- as a process


def config(folder: Path, **engine: Any) -> Config:
    load_format = engine.pop("load_format", "auto")
    settings = EngineConfig(**{"threads": 1, "kv_pages": PAGES, "max_running_requests": 64} | engine)
    return Config(model=ModelConfig(model=str(folder), load_format=load_format), engine=settings)


@asynccontextmanager
async def connected(
    settings: Config, max_queued_requests: int = 4
) -> AsyncIterator[tuple[AsyncEngine, EngineProcess]]:
    process = EngineProcess.start(settings)
    try:
        engine = await AsyncEngine.connect(process, max_queued_requests)
        try:
            yield engine, process
        finally:
            engine.stop()
    finally:
        process.stop()
    assert not Path(process.folder).exists(), "the sockets' folder is left behind"


def in_time(work: Callable[[], Awaitable[None]], seconds: float = 60.0) -> list[str]:
    """Runs it in a fresh event loop; returns what the event loop complained about.

    Every ZeroMQ context that the client made must be closed at the end: one that is left to the garbage
    collector can block it for ever.
    """
    complaints: list[str] = []
    contexts: list[zmq.Context] = []

    class Recorded(zmq.Context):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            contexts.append(self)

    async def limited() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: complaints.append(str(context))
        )
        await asyncio.wait_for(work(), seconds)
        gc.collect()  # an exception that nobody looked at is reported when its future goes

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zmq, "Context", Recorded)
            asyncio.run(limited())
    finally:
        left = [context for context in contexts if not context.closed]
        for context in left:
            context.destroy(linger=0)
    assert not left, "the client left its sockets open"
    return complaints


async def collect(stream: RequestStream) -> list[int]:
    return [token async for delta in stream for token in delta.ids]


def without_tensor(folder: Path, name: str) -> Path:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_start_up_errors_arrive_as_what_they_were(tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.7.down_proj.weight"
    broken = without_tensor(write_checkpoint(tmp_path / "broken", TINY), name)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text(json.dumps(TINY | {"model_type": "llama"}))
    cases: list[tuple[Path, type[Exception], str, str | None]] = [
        (broken, MissingTensor, f"{broken} lacks {name}", None),
        (
            tmp_path / "foreign",
            UnsupportedModel,
            f"{tmp_path}/foreign is a 'llama'",
            f"supported: {', '.join(names('models'))}",
        ),
    ]

    async def fails(process: EngineProcess, kind: type[Exception], message: str, hint: str | None) -> None:
        with pytest.raises(FireboxError) as caught:
            await AsyncEngine.connect(process, 4)
        assert (type(caught.value), str(caught.value), caught.value.hint) == (kind, message, hint)
        assert process.process.wait(10) == 1
        assert not Path(process.folder).exists()

    async def work() -> None:
        await asyncio.gather(*(fails(EngineProcess.start(config(folder)), *rest) for folder, *rest in cases))

    in_time(work)


@contextmanager
def stand_in(folder: Path) -> Iterator[tuple[EngineProcess, int]]:
    """A process that only lives as long as its pipe, and the end of that pipe that an engine would watch."""
    watch_fd, alive_fd = os.pipe()
    folder.mkdir()
    process = EngineProcess(subprocess.Popen(["cat"], stdin=watch_fd), str(folder), alive_fd)
    try:
        yield process, watch_fd
    finally:
        process.stop()
        os.close(watch_fd)


def test_every_error_of_start_up_keeps_its_class_and_hint(tmp_path: Path) -> None:
    kinds = [CheckpointError, *CheckpointError.__subclasses__(), ConfigError, OutOfMemory]
    cases = [(kind.__name__, kind) for kind in kinds] + [("ValueError", ConfigError), ("Any", ConfigError)]
    assert len(cases) == 11

    async def work() -> None:
        for number, (name, kind) in enumerate(cases):
            for hint in (None, "try something else"):
                with stand_in(tmp_path / f"{number}{bool(hint):d}") as (process, watch_fd):
                    with closing(Connection(process.folder, watch_fd)) as connection:
                        connection.send(Failed(name, f"{name} was raised", hint))
                        with pytest.raises(FireboxError) as caught:
                            await AsyncEngine.connect(process, 4)
                    found = caught.value
                    assert (type(found), str(found), found.hint) == (kind, f"{name} was raised", hint)

    in_time(work)


def test_an_error_waits_for_a_server_that_is_slow_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine may fail seconds before the server, busy with its own imports, binds its sockets."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text(json.dumps(TINY | {"model_type": "llama"}))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # allowed in the main thread alone

    async def work() -> None:
        with stand_in(tmp_path / "sockets") as (process, watch_fd):
            Path(process.folder, "config.json").write_bytes(msgspec.json.encode(config(tmp_path / "foreign")))
            thread = threading.Thread(target=engine_main, args=(process.folder, watch_fd), daemon=True)
            thread.start()
            await asyncio.sleep(1.5)
            if not thread.is_alive():  # it has given up; let the client see that
                process.process.kill()
            with pytest.raises(UnsupportedModel, match="'llama'"):
                await AsyncEngine.connect(process, 4)
            thread.join(10)
            assert not thread.is_alive()

    in_time(work)


@pytest.mark.parametrize("start", range(3))
def test_a_request_reaches_an_engine_that_was_there_first(
    tmp_path: Path, model: InProcessEngine, start: int
) -> None:
    """Sent at once when a client that was slow to start hears Ready. Sockets that failed to connect try again
    each by itself, so that one may lag behind the other: three starts, each of which could go wrong."""

    async def work() -> None:
        with stand_in(tmp_path / "sockets") as (process, watch_fd):
            engine_side = Connection(process.folder, watch_fd)
            engine_side.send(model.ready)
            await asyncio.sleep(0.35)
            client = await AsyncEngine.connect(process, 4)
            client.submit(PROMPT, GREEDY)
            (message,) = await asyncio.to_thread(engine_side.receive, True)
            assert isinstance(message, Generate) and message.prompt_ids == PROMPT
            engine_side.close()
            client.stop()

    in_time(work, 10)


def test_a_whole_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load progress, requests together, a full queue, aborts, and a clean end; under a TMPDIR too long for
    sockets."""
    far = tmp_path / ("long" * 25)
    far.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(far))
    folder = write_checkpoint(tmp_path / "checkpoint", TINY | {"max_position_embeddings": 4096})
    expected = InProcessEngine(folder, kv_pages=PAGES).generate([PROMPT, PROMPT[:2]])
    pages = 600
    progress: list[LoadProgress] = []

    async def work() -> None:
        process = EngineProcess.start(config(folder, max_running_requests=2, kv_pages=pages))
        engine = await AsyncEngine.connect(process, 3, progress.append)
        try:
            assert engine.ready.kv_pages == pages and engine.stats == Stats(
                kv_pages_total=pages, kv_pages_free=pages
            )
            streams = [engine.submit(prompt, GREEDY) for prompt in (PROMPT, PROMPT[:2])]
            assert await asyncio.gather(*map(collect, streams)) == expected
            assert engine.in_flight == 0

            running = [engine.submit(PROMPT, VERY_LONG) for _ in range(5)]
            with pytest.raises(QueueFull, match="5 requests are in flight; the limit is 5") as caught:
                engine.submit(PROMPT, GREEDY)
            assert caught.value.retry_after_s >= 1 and engine.in_flight == 5
            engine.require_room(0)
            await anext(running[0])
            for stream in running[1:]:
                stream.abort()
                stream.abort()
            assert engine.in_flight == 1
            again = engine.submit(PROMPT, GREEDY)
            assert await collect(again) == expected[0]
            running[0].abort()
            while engine.stats.aborted_requests < 5:
                await asyncio.sleep(0.01)
            assert engine.stats.kv_pages_free + engine.stats.kv_pages_cached == pages
        finally:
            status = engine.stop()
        assert status == 0 and not Path(process.folder).exists()

    assert in_time(work) == []
    loaded = [message.loaded_bytes for message in progress]
    assert loaded == sorted(loaded) and {m.total_bytes for m in progress} == {
        open_checkpoint(folder).total_bytes
    }


def test_kill_9_reaches_every_waiting_stream(tmp_path: Path) -> None:
    async def work() -> None:
        settings = config(dummy_folder(tmp_path), load_format="dummy", max_running_requests=2, kv_pages=600)
        async with connected(settings) as (engine, process):
            deaths: list[float] = []
            engine.on_death = lambda: deaths.append(time.monotonic())
            streams = [engine.submit(PROMPT, VERY_LONG) for _ in range(3)]
            waiting = [asyncio.create_task(collect(stream)) for stream in streams]
            while engine.stats.generated_tokens < 3:
                await asyncio.sleep(0.005)
            began = time.monotonic()
            os.kill(process.process.pid, signal.SIGKILL)
            for task in waiting:
                with pytest.raises(EngineDied, match="-9"):
                    await task
            assert time.monotonic() - began < 5 and len(deaths) == 1
            with pytest.raises(EngineDied, match="-9"):
                engine.submit(PROMPT, GREEDY)
            streams[0].abort()  # harmless

    in_time(work)


def test_a_process_that_dies_while_loading(tmp_path: Path) -> None:
    async def work() -> None:
        process = EngineProcess.start(config(dummy_folder(tmp_path), load_format="dummy"))
        os.kill(process.process.pid, signal.SIGKILL)
        try:
            with pytest.raises(EngineDied, match="-9"):
                await AsyncEngine.connect(process, 4)
            assert not Path(process.folder).exists(), "the sockets' folder is left behind"
        finally:
            assert process.stop() == -9

    in_time(work)


def test_stopping_with_nobody_there_is_silent(tmp_path: Path) -> None:
    """As after a start-up error: the process has gone, and the goodbye must not end as noise on stderr."""

    async def work() -> None:
        with stand_in(tmp_path / "sockets") as (process, _):
            AsyncEngine(process, 4).stop()

    assert in_time(work) == []


def test_the_process_ends_by_itself_when_the_server_is_gone(tmp_path: Path) -> None:
    """In the middle of a request, with outputs that nobody will read: no orphan stays."""
    process = EngineProcess.start(config(dummy_folder(tmp_path), load_format="dummy", kv_pages=600))
    decoder = msgspec.msgpack.Decoder(FromEngine)
    with zmq.Context() as context, context.socket(zmq.PUSH) as out, context.socket(zmq.PULL) as inward:
        out.setsockopt(zmq.LINGER, 0)
        out.connect(process.address("to-engine"))
        inward.bind(process.address("from-engine"))
        out.send(msgspec.msgpack.encode(Generate(1, PROMPT, VERY_LONG)))
        generated_tokens = 0
        while generated_tokens < 3:
            assert inward.poll(40_000), "the engine said nothing for 40 seconds"
            message = decoder.decode(inward.recv())
            generated_tokens = message.stats.generated_tokens if isinstance(message, Outputs) else 0
    began = time.monotonic()
    assert process.stop(10) == 0, "it had to be killed"
    assert time.monotonic() - began < 5
