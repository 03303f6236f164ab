"""One server process of a cell: a free port, a log, its health, and its end with everything it started."""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from firebox.env import for_process
from firebox.matrix.processes import MARKER, POLL_S, Process, belonging, end, look

HOST = "127.0.0.1"
HEALTH_S = 2.0  # for one answer of the health path
PORT_FREE_S = 10.0


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A started server. `marker` finds its processes again after this program is gone (see processes.py)."""

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], *, port: int, log: Path, marker: str
    ) -> None:
        """Starts it, in a session of its own; output goes to `log`. Raises OSError for a command that is not
        there."""
        self.port, self.log, self.marker = port, log, marker
        # SPT_NOENV: py-setproctitle, which SGLang and vLLM use, would write its title over the environment
        # that shows the marker.
        own = {MARKER: marker, "SPT_NOENV": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [part.replace("{port}", str(port)).replace("{python}", sys.executable) for part in argv],
                env=for_process({**{k: v.replace("{port}", str(port)) for k, v in env.items()}, **own}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.root = look(self._process.pid)

    @property
    def url(self) -> str:
        """Where it will serve."""
        return f"http://{HOST}:{self.port}"

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number if one ended it."""
        return self._process.poll()

    def alive(self) -> bool:
        """Does its first process run?"""
        return self.exit_code is None

    def wait_until_healthy(self, path: str, limit_s: float) -> bool:
        """True once the health path answers 200; False if it ends first, or after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while self.alive() and time.monotonic() < deadline:
            if healthy(self.port, path):
                return True
            time.sleep(5 * POLL_S)
        return False

    def wait_for_exit(self, limit_s: float) -> int | None:
        """Its exit code, if it ends by itself within `limit_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(limit_s)
        return None

    def stop(self, grace_s: float) -> list[str]:
        """Ends every process of it and waits until the port is free. Returns what went wrong."""
        left = end(self._processes, grace_s)
        self.wait_for_exit(PORT_FREE_S)
        problems = [f"process {each.pid} did not end after SIGKILL" for each in left]
        if not wait_for_port(self.port):
            problems.append(f"port {self.port} is still in use {PORT_FREE_S:.0f} s after the server's end")
        return problems

    def _processes(self) -> list[Process]:
        return belonging(self.marker, self.root)


def sweep(marker: str, root: Process | None, grace_s: float) -> int:
    """Ends what is left of a server that another run of this program started; says how many processes."""
    found = len(belonging(marker, root))
    if found:
        end(lambda: belonging(marker, root), grace_s)
    return found


def healthy(port: int, path: str) -> bool:
    """Does the server answer its health path with 200?"""
    connection = http.client.HTTPConnection(HOST, port, timeout=HEALTH_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_for_port(port: int) -> bool:
    """True once nobody listens there."""
    deadline = time.monotonic() + PORT_FREE_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(HEALTH_S)
            if probe.connect_ex((HOST, port)) != 0:
                return True
        time.sleep(POLL_S)
    return False
