"""Streamed completions in threads, token by token, against a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import httpx

from tests.support.server_process import ServerProcess, wait_for

TIMEOUT_S = 60


def body(prompt: Sequence[int], tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy completion of exactly so many tokens."""
    fields = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"prompt": list(prompt), **fields, **more}


def post(server: ServerProcess, prompt: Sequence[int], tokens: int, **more: Any) -> httpx.Response:
    """Waits for the whole reply."""
    url = f"{server.url}/v1/completions"
    return httpx.post(url, json=body(prompt, tokens, **more), timeout=TIMEOUT_S)


def ids_of(reply: httpx.Response) -> list[int]:
    """The answer's tokens."""
    assert reply.status_code == 200, reply.text
    ids: list[int] = reply.json()["choices"][0]["token_ids"]
    return ids


class Stream(threading.Thread):
    """Begins at once. `ids` as they come; `error`: the event that ended it, or the reply's body; `leave`
    closes the connection at the next event."""

    def __init__(self, server: ServerProcess, prompt: Sequence[int], tokens: int, **more: Any) -> None:
        super().__init__(daemon=True)
        self.url, self.body = f"{server.url}/v1/completions", body(prompt, tokens, stream=True, **more)
        self.ids: list[int] = []
        self.status = 0
        self.error: Any = None
        self.done = self.leave = False
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self.url, json=self.body, timeout=TIMEOUT_S) as reply:
            self.status = reply.status_code
            if self.status != 200:
                self.error = json.loads(reply.read())["error"]
                return
            for line in reply.iter_lines():
                if self.leave:
                    return
                self._take(line.removeprefix("data: "))

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.done = True
        elif data:
            event = json.loads(data)
            self.error = event.get("error")
            for choice in event.get("choices", ()):
                self.ids += choice.get("token_ids") or ()

    def wait(self) -> Stream:
        """Until it has ended."""
        self.join(TIMEOUT_S)
        assert not self.is_alive(), "the stream goes on"
        return self

    def wait_for_tokens(self, count: int) -> Stream:
        """Until so many have come."""
        wait_for(lambda: len(self.ids) >= count or not self.is_alive(), TIMEOUT_S)
        assert len(self.ids) >= count, (self.status, self.error)
        return self


def nothing_is_held(server: ServerProcess) -> None:
    """Waits until no request runs or waits, and none holds a page."""

    def idle() -> bool:
        found = server.metrics()
        held = (
            found["firebox_kv_pages/total"]
            - found["firebox_kv_pages/free"]
            - found["firebox_kv_pages/cached"]
        )
        return held == found["firebox_requests_running"] == found["firebox_requests_waiting"] == 0

    wait_for(idle, 10)
