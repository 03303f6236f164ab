"""The engine's loop: take messages in, plan, run, apply, send what came out. One process a rank runs it."""

from __future__ import annotations

import os
import time

import msgspec
import zmq

from firebox.engine.messages import Abort, Drain, FromEngine, Generate, Outputs, Progress, Stats, ToEngine
from firebox.engine.pipeline import Pipeline
from firebox.engine.request import Request
from firebox.engine.runner import Runner
from firebox.engine.scheduler import Plan, Scheduler


class Connection:
    """The engine's ends of the two sockets, and the pipe whose other end the server process holds for as long
    as it lives."""

    def __init__(self, folder: str, watch_fd: int) -> None:
        self._watch_fd = watch_fd
        self._context = zmq.Context()
        self._in = self._context.socket(zmq.PULL)
        self._out = self._context.socket(zmq.PUSH)
        for socket in (self._in, self._out):
            socket.set_hwm(0)  # before they connect, or it means nothing
        self._in.bind(f"ipc://{folder}/to-engine")
        self._out.connect(f"ipc://{folder}/from-engine")
        self._poller = zmq.Poller()
        self._poller.register(self._in, zmq.POLLIN)
        self._poller.register(watch_fd, zmq.POLLIN)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        """Queues a message for the server; never blocks."""
        self._out.send(self._encoder.encode(message))

    def receive(self, wait: bool) -> list[ToEngine]:
        """Messages that have arrived; with `wait`, at least one. Raises EOFError once the server process is
        gone."""
        ready = dict(self._poller.poll(None if wait else 0))
        if self._watch_fd in ready and not os.read(self._watch_fd, 1):
            raise EOFError("the server process is gone")
        messages: list[ToEngine] = []
        while True:
            try:
                messages.append(self._decoder.decode(self._in.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def require_server(self) -> None:
        """Raises EOFError once the server process is gone."""
        if dict(self._poller.poll(0)).get(self._watch_fd) and not os.read(self._watch_fd, 1):
            raise EOFError("the server process is gone")

    def close(self, linger_s: float = 1.0) -> None:
        """Delivers what is queued, for at most `linger_s`, and closes the sockets."""
        self._context.destroy(linger=int(linger_s * 1000))


def run(connection: Connection, scheduler: Scheduler, runner: Runner) -> None:
    """Serves until a Drain has been received and everything is finished, or the server process is gone."""
    draining = False
    step_seconds = 0.0
    pipeline = Pipeline(scheduler, runner, goes_on=True)
    while pipeline.has_work or not draining:
        for message in connection.receive(wait=not pipeline.has_work):
            draining |= isinstance(message, Drain)
            take(message, scheduler)
        began = time.perf_counter()
        done = pipeline.step()
        if done is None:
            # an abort that emptied the engine: the gauges must show it
            connection.send(Outputs([], _stats(scheduler, runner, step_seconds)))
            continue
        plan, deltas = done
        step_seconds += time.perf_counter() - began
        stats = _stats(scheduler, runner, step_seconds)
        connection.send(Outputs(deltas, stats, _progress(plan), runner.news()))


def take(message: ToEngine, scheduler: Scheduler) -> None:
    """Applies one message to the scheduler."""
    if isinstance(message, Generate):
        scheduler.add(Request(message.request_id, message.prompt_ids, message.params, message.priority))
    elif isinstance(message, Abort):
        for request_id in message.request_ids:
            scheduler.abort(request_id)


def _stats(scheduler: Scheduler, runner: Runner, step_seconds: float) -> Stats:
    modes = {"/".join(mode): count for mode, count in runner.steps.items()}
    return msgspec.structs.replace(scheduler.stats(), step_seconds=step_seconds, step_modes=modes)


def _progress(plan: Plan) -> list[Progress]:
    """Prompts that took part in this step and are not finished."""
    return [
        Progress(chunk.request.request_id, chunk.start + chunk.count, chunk.request.prompt_tokens)
        for chunk in plan.chunks
        if chunk.start + chunk.count < chunk.request.prompt_tokens
    ]
