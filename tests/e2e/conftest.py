"""Real server processes with the bundled model, over real sockets on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.support.server_process import ServerProcess, is_alive, serving, wait_for

__all__ = ["LIMITS", "ServerProcess", "is_alive", "serving", "wait_for"]

LIMITS = ("--max-running-requests", "8", "--max-queued-requests", "8", "--max-body-bytes", "200000")


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """The one server that most tests share."""
    with serving(*LIMITS) as process:
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> openai.OpenAI:
    return server.client()
