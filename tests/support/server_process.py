"""Real server processes over real sockets on loopback."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

START_TIMEOUT_S = 90
FAULTY = Path(__file__).parent / "faulty"


class ServerProcess:
    """`firebox serve` with these arguments; `url` once it has said where it serves. `faulty`: its engine has
    the faults of tests/support/faulty."""

    def __init__(self, *arguments: str, faulty: bool = False) -> None:
        self.log: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "firebox", "serve", "--port", "0", *arguments],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=with_faults() if faulty else None,
        )
        threading.Thread(target=self._read_log, daemon=True).start()

    def wait_until_ready(self) -> ServerProcess:
        deadline = time.monotonic() + START_TIMEOUT_S
        while (line := self._lines.get(timeout=deadline - time.monotonic())) is not None:
            if found := re.search(r"at (http://\S+)$", line):
                self.url = found[1]
                return self
        raise AssertionError("the server ended while starting:\n" + "".join(self.log))

    def client(self, **options: Any) -> Any:
        """OpenAI's own."""
        import openai  # not on every machine with a GPU

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60, **options)

    def metrics(self) -> dict[str, float]:
        """/metrics as {'name' or 'name/label value': number}."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        return {
            "/".join([sample.name, *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def engine_pid(self) -> int:
        """The engine process: the only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def wait_for_exit(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            self._lines.put(line)
        self._lines.put(None)


@contextlib.contextmanager
def serving(*arguments: str, faulty: bool = False) -> Iterator[ServerProcess]:
    server = ServerProcess(*arguments, faulty=faulty)
    try:
        yield server.wait_until_ready()
    finally:
        server.end()


def with_faults() -> dict[str, str]:
    """This process's environment, in which engines have faults."""
    paths = [str(FAULTY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def wait_for(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
