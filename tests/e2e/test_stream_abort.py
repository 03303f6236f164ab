"""A client that leaves frees its KV pages within a step."""

from __future__ import annotations

import httpx
import pytest

from tests.e2e.conftest import ServerProcess, wait_for

ENDLESS = {"prompt": "def f(", "max_tokens": 3000, "ignore_eos": True, "temperature": 1.0}


def pages_in_use(server: ServerProcess) -> float:
    """Pages that only a request holds; what it has finished is the prefix tree's, which may evict it."""
    found = server.metrics()
    return found["firebox_kv_pages/total"] - found["firebox_kv_pages/free"] - found["firebox_kv_pages/cached"]


@pytest.mark.parametrize("n", [1, 4])
def test_leaving_a_stream_frees_its_pages(server, n):
    before = server.metrics()
    body = {**ENDLESS, "stream": True, "n": n}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as stream:
        lines = stream.iter_lines()
        for _ in range(20):
            next(lines)
        assert server.metrics()["firebox_requests_running"] == n
        assert server.metrics()["firebox_kv_pages/free"] < before["firebox_kv_pages/free"]
    wait_for(lambda: server.metrics()["firebox_requests_running"] == 0, 2)
    assert pages_in_use(server) == 0
    after = server.metrics()
    assert after["firebox_aborted_requests_total"] == before["firebox_aborted_requests_total"] + n
    assert after["firebox_generated_tokens_total"] - before["firebox_generated_tokens_total"] < n * 3000


def test_leaving_before_the_answer_is_complete(server):
    """Not streamed: the server notices although it has nothing to send."""
    aborted = server.metrics()["firebox_aborted_requests_total"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=ENDLESS, timeout=0.3)
    wait_for(lambda: server.metrics()["firebox_aborted_requests_total"] == aborted + 1, 2)
    assert server.metrics()["firebox_requests_running"] == 0
    assert pages_in_use(server) == 0


def test_a_stop_string_frees_the_pages_too(server):
    body = {**ENDLESS, "stop": ["e"]}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    wait_for(lambda: pages_in_use(server) == 0, 2)
