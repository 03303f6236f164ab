"""SIGTERM drains, and gives up at its time limit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ServerProcess, is_alive, serving, wait_for


def test_sigterm_lets_running_answers_finish_and_takes_no_new_ones():
    with serving() as server:
        engine = server.engine_pid()
        body = {"prompt": "def f(", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            lines = (line for line in stream.iter_lines() if line)
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not _accepts(server), 2)
            *_, usage, done = lines
        assert done == "data: [DONE]"
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 1500
        assert server.wait_for_exit(10) == 0
        assert not is_alive(engine)


def test_drain_ends_at_its_time_limit():
    with serving("--drain-timeout-s", "0.3") as server:
        body = {"prompt": "def f(", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_for_exit(10) == 0
            with pytest.raises(httpx.RemoteProtocolError):  # it did not wait for the answer's end
                list(lines)


def test_interrupted_while_loading():
    server = ServerProcess()
    try:
        wait_for(lambda: _children(server) == 1, 10)
        engine = server.engine_pid()
        wait_for(lambda: _catches(server, signal.SIGTERM), 10)  # its handlers stand: it loads now
        server.process.send_signal(signal.SIGINT)
        assert server.wait_for_exit(10) == 0
        wait_for(lambda: not is_alive(engine), 5)
        assert not any("serves" in line for line in server.log)
        assert not any("Traceback" in line for line in server.log)
    finally:
        server.end()


def test_taken_port_is_found_before_loading():
    with serving() as server:
        port = server.url.rsplit(":", 1)[1]
        second = ServerProcess("--port", port)
        assert second.wait_for_exit(10) == 2
        assert any(line.startswith("error: cannot listen") for line in second.log)


def _catches(server: ServerProcess, number: signal.Signals) -> bool:
    """Does the server process have a handler for this signal?"""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def _accepts(server: ServerProcess) -> bool:
    try:
        httpx.get(f"{server.url}/health", timeout=2)
    except httpx.TransportError:  # refused, or taken by the listener in the moment it closed
        return False
    return True


def _children(server: ServerProcess) -> int:
    with open(f"/proc/{server.process.pid}/task/{server.process.pid}/children") as file:
        return len(file.read().split())
