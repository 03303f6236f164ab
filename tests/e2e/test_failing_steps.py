"""A server whose steps fail: who made them fail is told, the others are served as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support.faulty.sitecustomize import ILLEGAL, LATE, LATE_TOKENS, MEMORY, POISON
from tests.support.server_process import ServerProcess, serving, wait_for
from tests.support.streams import Stream, ids_of, nothing_is_held, post

PROMPTS = [[40, 41, 42], [50] * 30, [60, 7, 61, 8]]
TOKENS = 60


@pytest.fixture(scope="module")
def faulty() -> Iterator[ServerProcess]:
    with serving("--device", "cpu", faulty=True) as server:
        yield server


def test_a_request_whose_step_fails_is_told_and_the_others_are_not(faulty: ServerProcess) -> None:
    expected = [ids_of(post(faulty, prompt, TOKENS)) for prompt in PROMPTS]
    before = faulty.metrics()
    others = [Stream(faulty, prompt, TOKENS) for prompt in PROMPTS]
    others[0].wait_for_tokens(3)
    late = Stream(faulty, [LATE, 5, 6], TOKENS)
    reply = post(faulty, [POISON, 5, 6], TOKENS)
    assert reply.status_code == 500
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "step_failed")
    assert "the step that computed this request failed: RuntimeError: a kernel failed" in error["message"]
    assert "more lines" not in error["message"], "one line of it is enough"
    late.wait()
    assert len(late.ids) == LATE_TOKENS and late.error["code"] == "step_failed" and not late.done
    assert [stream.wait().ids for stream in others] == expected
    assert all(stream.done for stream in others)
    nothing_is_held(faulty)
    after = faulty.metrics()
    assert after["firebox_failed_requests_total"] - before["firebox_failed_requests_total"] == 2
    assert any("requests failed: RuntimeError: a kernel failed" in line for line in faulty.log)
    assert ids_of(post(faulty, PROMPTS[0], TOKENS)) == expected[0], "the next one is served"
    assert httpx.get(f"{faulty.url}/health").status_code == 200


def test_out_of_memory_ends_one_request(faulty: ServerProcess) -> None:
    other = Stream(faulty, PROMPTS[1], TOKENS).wait_for_tokens(3)
    reply = post(faulty, [MEMORY, 1, 2], 5)
    assert reply.status_code == 500 and "allocate" in reply.json()["error"]["message"]
    assert len(other.wait().ids) == TOKENS and other.done
    nothing_is_held(faulty)


def test_several_answers_of_one_request_end_together(faulty: ServerProcess) -> None:
    reply = post(faulty, [LATE, 1, 2], 20, n=3, temperature=1.0)
    assert reply.status_code == 500 and reply.json()["error"]["code"] == "step_failed"
    nothing_is_held(faulty)


def test_a_lost_device_ends_the_server_which_says_so() -> None:
    with serving("--device", "cpu", faulty=True) as server:
        other = Stream(server, PROMPTS[0], 3000).wait_for_tokens(3)
        reply = post(server, [ILLEGAL, 1], 5)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_died")
        assert "ended with status 1: the context is lost" in reply.json()["error"]["message"]
        assert "the context is lost" in other.wait().error["message"]
        assert server.wait_for_exit(15) == 1
        wait_for(lambda: any("the context is lost" in line for line in server.log), 5)
