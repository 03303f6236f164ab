"""Clients that leave, and an engine that dies."""

from __future__ import annotations

import json

import pytest

from tests.cpu.server.conftest import Served, error_of, events, says
from tests.support.server_process import wait_for


def post(server: Served, body: dict[str, object]):
    """Sends a request over a socket of its own, and gives the socket."""
    data = json.dumps({"prompt": "hi", "max_tokens": 200, **body}).encode()
    connection = server.socket()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(data), data)
    )
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_aborts_every_answer_at_once(serve, tokenizer, stream, n):
    server = serve(says(tokenizer, "word ", ends=False), step_s=0.05)
    with post(server, {"stream": stream, "n": n}) as connection:
        wait_for(lambda: len(server.engine.generated) == n)
        if stream:
            assert connection.recv(100)
        assert server.engine.aborted == []
    wait_for(lambda: sorted(server.engine.aborted) == list(range(n)), 1.0)
    assert server.engine.in_flight == 0


def test_leaving_while_the_engine_is_silent(serve):
    server = serve(None)
    with post(server, {"stream": True}):
        wait_for(lambda: len(server.engine.generated) == 1)
    wait_for(lambda: server.engine.aborted == [0], 1.0)


def test_an_answer_that_met_its_stop_string_does_not_wait_for_the_others(serve, tokenizer):
    texts = {0: "a stop and more", 1: "and on and on " * 100}
    server = serve(lambda prompt_ids, params: tokenizer.encode(texts[params.seed]), step_s=0.02)
    with post(server, {"n": 2, "seed": 0, "stop": "stop"}):
        wait_for(lambda: server.engine.aborted == [0], 2)
        assert server.engine.in_flight == 1


def test_a_finished_answer_is_not_aborted(serve, tokenizer):
    server = serve(says(tokenizer, "x"))
    assert server.complete().status_code == 200
    assert len(events(server.complete(stream=True).text)) >= 2
    assert server.engine.aborted == []


def test_death_answers_503_and_ends_streams_with_an_error(serve, tokenizer):
    server = serve(says(tokenizer, "word ", ends=False), step_s=0.05)
    with (
        post(server, {}) as waiting,
        server.client.stream(
            "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 200, "stream": True}
        ) as stream,
    ):
        lines = stream.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        server.in_loop(server.engine.die)
        *_, last = events("\n\n".join(line for line in lines if line))
        head = waiting.recv(10_000)
    assert last["error"]["code"] == "engine_died"
    assert last["error"]["type"] == "server_error"
    assert head.startswith(b"HTTP/1.1 503 ")
    for response in (server.complete(), server.chat(stream=True), server.client.get("/health")):
        assert response.status_code == 503
        assert error_of(response)["code"] == "engine_died"
    assert "firebox_engine_up 0.0" in server.client.get("/metrics").text
