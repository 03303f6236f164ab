"""Measures candidates in a process of their own: one that hangs or takes the GPU's context with it costs
itself and a new process, not the run.

The process names each candidate before it touches it, so that whoever waits knows which one was at work.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from firebox.bench.timer import now
from firebox.find import load
from firebox.hardware.base import Gpu
from firebox.tuning.base import Candidate, Option, Task
from firebox.tuning.clock import Effort

LIMIT_S = 60.0  # of one candidate, the making of its data included
BEGINS, ANSWERS, FAILS, SECONDS = "begins", "answers", "fails", "seconds"
Serve = Callable[[Connection, Gpu], None]


@dataclass(frozen=True)
class Order:
    """What the process is asked for: the candidates of a task by name (it makes its own of them), or with
    `further` what the option of these parts launches besides."""

    task: Task
    names: tuple[str, ...]
    effort: Effort
    further: bool = False


class Worker:
    """See search.Meter. `seconds`: for which the GPU was used to check, capture and time; making weights and
    loading kernels aside. `serve`: what runs in the process."""

    def __init__(self, gpu: Gpu, limit_s: float = LIMIT_S, serve: Serve | None = None) -> None:
        self._gpu, self._limit_s, self._serve = gpu, limit_s, serve or measure_forever
        self._pipe: Connection | None = None
        self._process: Any = None
        self.seconds = 0.0

    def samples(self, task: Task, candidates: Sequence[Candidate], effort: Effort) -> list[list[float] | str]:
        """Microseconds of each candidate, or why there are none; those that can be timed are timed in
        turn."""
        found: dict[str, list[float] | str] = {}
        names = [c.name for c in candidates]
        while left := [name for name in names if name not in found]:
            found |= self._ask(Order(task, tuple(left), effort))
        return [found[name] for name in names]

    def further(self, task: Task, option: Option, effort: Effort) -> list[float] | str:
        """Of what the option's path launches besides its parts."""
        names = tuple(c.name for c in option.parts.values())
        found = self._ask(Order(task, names, effort, further=True))
        return next(iter(found.values()))

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, order: Order) -> dict[str, list[float] | str]:
        """What came back. A process that dies or hangs gives the fault of the candidate it was at; the others
        are asked for again."""
        pipe = self._started()
        at, found = order.names[0], dict[str, list[float] | str]()
        try:
            pipe.send(order)
            while True:
                if not pipe.poll(self._limit_s):
                    self.close()
                    return found | {at: f"took longer than {self._limit_s:.0f} s"}
                kind, name, fact = pipe.recv()
                if kind == BEGINS:
                    at = name
                elif kind == SECONDS:
                    self.seconds += fact
                    return found
                else:
                    found[name] = fact
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            return found | {at: f"the process died (exit {code})"}

    def _started(self) -> Connection:
        if self._pipe is None:
            context = get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=self._serve, args=(theirs, self._gpu), daemon=True)
            self._process.start()
            theirs.close()
        return self._pipe


def measure_forever(pipe: Connection, gpu: Gpu) -> None:
    """Runs in the process: answers orders until the other end goes."""
    from firebox.kernels._triton import warm

    warm()
    desk = _Desk(gpu)
    with contextlib.suppress(EOFError, OSError):
        while True:
            order = pipe.recv()
            desk.make_weights(order.task)
            desk.load_kernels(order)
            began = now()
            (desk.further if order.further else desk.samples)(order, pipe)
            pipe.send((SECONDS, "", now() - began))


class _Desk:
    """Holds the weights of the problem at hand, and the bench and graphs of the task at hand."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._problem: Any = None
        self._make: Any = None
        self._task: Task | None = None
        self._bench: Any = None
        self._named: dict[str, Candidate] = {}
        self._graphs: dict[str, Any] = {}
        self._right: set[str] = set()

    def samples(self, order: Order, pipe: Connection) -> None:
        """Checks, captures, then times in turn."""
        from firebox.tuning.clock import interleaved_us

        self._turn_to(order.task)
        timed = []
        for name in order.names:
            pipe.send((BEGINS, name, None))
            try:
                why = self._ready(name)
            except Exception as error:  # noqa: BLE001 (whatever a candidate does is its own fault)
                pipe.send((FAILS, name, _said(error)))
                _end_if_lost()
                continue
            if why is not None:
                pipe.send((FAILS, name, why))
            else:
                timed.append(name)
        found = interleaved_us([self._graphs[name] for name in timed], order.effort)
        for name, us in zip(timed, found, strict=True):
            pipe.send((ANSWERS, name, us))

    def further(self, order: Order, pipe: Connection) -> None:
        """One answer, under the first name."""
        from firebox.tuning.clock import Graph, interleaved_us

        name = order.names[0]
        self._turn_to(order.task)
        parts = {self._named[n].part: self._named[n] for n in order.names}
        calls = self._bench.further(self._named[name].path, parts)
        us = interleaved_us([Graph(calls)], order.effort)[0] if calls else [0.0]
        pipe.send((ANSWERS, name, us))

    def make_weights(self, task: Task) -> None:
        """Of the task's problem, unless they are there."""
        import torch

        if task.problem == self._problem:
            return
        self._make = self._bench = self._task = None
        self._graphs.clear()
        self._right.clear()
        torch.cuda.empty_cache()
        self._make, self._problem = load("tuning", task.op).bench(task.problem, self._gpu), task.problem

    def load_kernels(self, order: Order) -> None:
        """Of the candidates, and with a new task of what is launched beside them. Triton reads each from disk
        and, for a signature that comes for the first time, has a C function compiled."""
        from firebox.tuning._launchers import launcher

        tunable = load("tuning", order.task.op)
        wanted: list[Any] = []
        if order.task != self._task:
            self._named = {c.name: c for c in tunable.candidates(order.task, self._gpu)}
            wanted += tunable.further_requests(order.task, self._gpu)
        wanted += [self._named[name].request for name in order.names]
        for request in wanted:
            if request is not None:
                with contextlib.suppress(Exception):  # the candidate's own turn says what is wrong
                    launcher(request).load()

    def _turn_to(self, task: Task) -> None:
        if task == self._task:
            return
        self._bench = None
        self._graphs.clear()
        self._bench, self._task = self._make(task.tokens), task

    def _ready(self, name: str) -> str | None:
        """Why the candidate cannot be timed, or None. What has been found right once is not checked again
        where the very same code runs."""
        from firebox.tuning.clock import Graph

        if name in self._graphs:
            return None
        candidate = self._named[name]
        code = candidate.code or candidate.name
        if code not in self._right:
            error, limit = self._bench.error(candidate)
            if not error <= limit:
                return f"wrong: relative error {error:.3g}, at most {limit:.3g}"
            self._right.add(code)
        self._graphs[name] = Graph(self._bench.calls(candidate), ready=candidate.request is not None)
        return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {traceback.format_exception_only(error)[-1].strip()[:300]}"


def _end_if_lost() -> None:
    """An illegal access spoils the GPU's context for every candidate that follows."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise SystemExit(1) from error
