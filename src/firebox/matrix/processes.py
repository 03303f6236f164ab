"""Which processes belong to a server, and ending them: all of them, and no others.

A server is a tree that may lose its root: workers are started in sessions of their own, and outlive a parent
that crashed. Whatever its way, a process belongs to a server if

  its environment holds the server's marker (environments are inherited, and the marker is random),
  or it descends from such a process,
  or it is in the session of the process that was started, while one such process is in it too.

A signal goes through a pidfd that is opened before the process is looked at, so that it cannot reach a
stranger who was given the pid in the meantime.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

MARKER = "FIREBOX_MATRIX_MARKER"
POLL_S = 0.02
PROC = Path("/proc")


class Process(NamedTuple):
    """A process, told from later ones with its pid by `started` (clock ticks since boot)."""

    pid: int
    started: int


class _Seen(NamedTuple):
    process: Process
    parent: int
    session: int
    marked: bool


def look(pid: int) -> Process | None:
    """The process with this pid; None if there is none, or only a zombie that waits to be reaped."""
    seen = _look(pid, "")
    return None if seen is None else seen.process


def belonging(marker: str, root: Process | None = None) -> list[Process]:
    """Every living process of the server with this marker, whose first process was `root`."""
    here = os.getpid()
    pids = (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())
    seen = [found for pid in pids if pid != here and (found := _look(pid, marker)) is not None]
    members = {found.process.pid for found in seen if found.marked or found.process == root}
    if root is not None and any(f.process.pid in members and f.session == root.pid for f in seen):
        members |= {found.process.pid for found in seen if found.session == root.pid}
    while True:
        heirs = {found.process.pid for found in seen if found.parent in members} - members
        if not heirs:
            return [found.process for found in seen if found.process.pid in members]
        members |= heirs


def end(find: Callable[[], list[Process]], grace_s: float, kill_s: float = 10.0) -> list[Process]:
    """SIGTERM to all that `find` finds, SIGKILL to those that are left after `grace_s`; what appears
    meanwhile is ended too, and what was found once, though the parent by which it was found has ended.
    Returns what would not die within `kill_s`: nothing, unless a driver holds it."""
    told: set[Process] = set()

    def living() -> list[Process]:
        found = find()
        return found + [each for each in told.difference(found) if look(each.pid) == each]

    deadline = time.monotonic() + grace_s
    while (left := living()) and time.monotonic() < deadline:
        send((each for each in left if each not in told), signal.SIGTERM)
        told.update(left)
        time.sleep(POLL_S)
    deadline = time.monotonic() + kill_s
    while left and time.monotonic() < deadline:
        send(left, signal.SIGKILL)
        time.sleep(POLL_S)
        left = living()
    return left


def send(processes: Iterable[Process], number: signal.Signals) -> None:
    """A signal to each of these that still is the process it was."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(process.pid)
            try:
                if look(process.pid) == process:
                    signal.pidfd_send_signal(handle, number)
            finally:
                os.close(handle)


def _look(pid: int, marker: str) -> _Seen | None:
    folder = PROC / str(pid)
    try:
        fields = (folder / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()
        environment = (folder / "environ").read_bytes() if marker else b""
    except PermissionError:  # another user's: not ours
        return None
    except (FileNotFoundError, ProcessLookupError):  # it ended while it was looked at
        return None
    if fields[0] in ("Z", "X"):
        return None
    marked = bool(marker) and f"{MARKER}={marker}".encode() in environment.split(b"\0")
    return _Seen(Process(pid, int(fields[19])), int(fields[1]), int(fields[3]), marked)
