"""Runs functions in forked processes, so many at a time, each with a time limit. A function that crashes or
hangs its process costs its own result and nothing else.

Forked, not spawned: a child has the parent's modules and kernels and starts within milliseconds. The children
touch neither CUDA nor torch. Answers travel as JSON through a pipe.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

Work = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """`index`: which function; `answer`: what it returned, or None with `error` saying why. `crashed`: the
    process died or was ended for its time, so that another try may go otherwise."""

    index: int
    answer: dict[str, Any] | None
    error: str | None
    crashed: bool
    seconds: float


def run_all(works: Sequence[Work], workers: int, limit_s: float) -> Iterator[Outcome]:
    """Calls each function with an empty folder that goes when it ends; yields outcomes as they come.
    Functions return JSON documents; standard output, error and temporary files go to that folder."""
    waiting, running = deque(enumerate(works)), dict[Connection, _Job]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = _Job(*waiting.popleft(), limit_s)
                running[job.pipe] = job
            first = min(job.deadline for job in running.values())
            ready = wait(list(running), timeout=max(0.0, first - time.monotonic()))
            late = [pipe for pipe, job in running.items() if job.deadline <= time.monotonic()]
            for pipe in {*ready, *late}:
                yield running.pop(pipe).finish(answered=pipe in ready)  # type: ignore[call-overload]
    finally:
        for job in running.values():
            job.finish(answered=False)


@dataclass
class _Job:
    """One function in its process."""

    index: int
    work: Work
    limit_s: float
    folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(
            prefix="firebox-compile-",
            ignore_cleanup_errors=True,  # an assembler may be dying in it
        )
    )

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.deadline = self.began + self.limit_s
        self.pipe, theirs = get_context("fork").Pipe(duplex=False)
        self.process: BaseProcess = get_context("fork").Process(
            target=_child, args=(self.work, theirs, Path(self.folder.name))
        )
        self.process.start()
        theirs.close()

    def finish(self, *, answered: bool) -> Outcome:
        """Reads the answer, if there is one, and ends the process with all that it started."""
        said = self._receive() if answered else None
        self._end()
        crashed = said is None
        if said is None:
            said = {"error": self._last_words() if answered else f"took longer than {self.limit_s:g} s"}
        self.folder.cleanup()
        seconds = time.monotonic() - self.began
        return Outcome(self.index, said.get("answer"), said.get("error"), crashed, seconds)

    def _receive(self) -> dict[str, Any] | None:
        try:
            said: dict[str, Any] = json.loads(self.pipe.recv_bytes())
        except EOFError:  # the process died
            return None
        return said

    def _end(self) -> None:
        """Ends the process group that the child leads: the assembler runs in it, and may outlive the child.
        Before `join`, because until then nobody else can have that number."""
        assert self.process.pid is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # not its own group yet
            self.process.kill()
        self.process.join()
        self.pipe.close()

    def _last_words(self) -> str:
        code = self.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the compiler died ({how}): {_tail(Path(self.folder.name) / 'output')}"


def _child(work: Work, pipe: Connection, folder: Path) -> NoReturn:
    os.setsid()
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    tempfile.tempdir = str(folder)
    faulthandler.disable()  # a crash here is a result, not the parent's
    sys.stdout = sys.stderr = os.fdopen(output, "w")  # the old ones may be captured by the parent
    try:
        said: dict[str, Any] = {"answer": work(folder)}
    except Exception as error:  # noqa: BLE001 (whatever a compiler raises is its result)
        said = {"error": _sentence(error, folder / "output")}
    pipe.send_bytes(json.dumps(said).encode())
    os._exit(0)


def _sentence(error: BaseException, output: Path) -> str:
    """The root of an error in one line, with what the compiler printed where the error itself says
    nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, RuntimeError):  # "PassManager::run failed"
        text += f" {_tail(output)}"
    return " ".join(text.split())[:600]


def _tail(output: Path) -> str:
    """The lines with an error in them, or the last one."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    return " ".join([line for line in lines if "error" in line.lower()][:3] or lines[-1:])[:400]
