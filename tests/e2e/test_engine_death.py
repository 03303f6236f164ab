"""kill -9: of the engine process, and of the server process."""

from __future__ import annotations

import os
import signal
import threading

import httpx
import openai
import pytest

from tests.e2e.conftest import is_alive, serving, wait_for

ENDLESS = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}}


def test_killed_engine_is_reported_and_ends_the_server():
    with serving() as server:
        client = server.client()
        waiting: list[Exception] = []

        def wait_for_answer() -> None:
            try:
                client.completions.create(model="firebox-tiny", prompt="a", **ENDLESS)
            except openai.APIError as error:
                waiting.append(error)

        thread = threading.Thread(target=wait_for_answer)
        thread.start()
        stream = client.completions.create(model="firebox-tiny", prompt="b", stream=True, **ENDLESS)
        next(iter(stream))
        wait_for(lambda: server.metrics()["firebox_requests_running"] == 2, 5)

        os.kill(server.engine_pid(), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="engine process ended"):
            list(stream)
        thread.join(5)
        assert isinstance(waiting[0], openai.InternalServerError)
        assert waiting[0].status_code == 503
        assert waiting[0].code == "engine_died"
        assert httpx.get(f"{server.url}/health").status_code == 503
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "c"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_died")
        assert server.wait_for_exit(10) == 1
        assert any("error: the engine process ended with status -9" in line for line in server.log)


def test_killed_server_takes_its_engine_along():
    with serving() as server:
        engine = server.engine_pid()
        assert is_alive(engine)
        found = server.metrics()  # before the first step
        assert found["firebox_kv_pages/free"] == found["firebox_kv_pages/total"] > 0
        server.process.kill()
        wait_for(lambda: not is_alive(engine), 10)
