"""Whatever is wrong with a request: the status, OpenAI's error shape, and the field at fault."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.cpu.server.conftest import Served, error_of, says, serving

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def shared(tokenizer) -> Iterator[Served]:
    with serving(tokenizer, says(tokenizer, "x")) as server:
        yield server


@pytest.fixture
def server(shared) -> Served:
    shared.engine.generated.clear()
    return shared


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": []}, "tools", "unsupported_parameter"),
        ({"tool_choice": "auto"}, "tool_choice", "unsupported_parameter"),
        ({"functions": []}, "functions", "unsupported_parameter"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls", "unsupported_parameter"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
        ({"audio": {}}, "audio", "unsupported_parameter"),
        ({"modalities": ["text"]}, "modalities", "unsupported_parameter"),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"not a field": 1}, "not a field", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [USER, {"role": "user"}]}, "messages.1.content", "missing_required_parameter"),
        ({"messages": [{**USER, "tool_calls": []}]}, "messages.0.tool_calls", "unsupported_parameter"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_k": 10**30}, "top_k", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
        ({"stop_token_ids": [99999]}, "stop_token_ids", "invalid_value"),
        ({"top_logprobs": 3}, None, "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, None, "invalid_value"),
        ({"stream": True, "stream_options": {"chunk": 1}}, "stream_options.chunk", "unsupported_parameter"),
        ({"priority": 2**40}, "priority", "invalid_value"),
    ],
)
def test_wrong_chat_field_is_400_and_named(server, fields, param, code):
    response = server.chat(**fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code)
    assert server.engine.generated == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
        {"type": "input_image", "image_url": "data:,"},
        {"type": "video_url", "video_url": {"url": "data:,"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    ],
)
@pytest.mark.parametrize("before", [[], [{"type": "text", "text": "what is this?"}]])
def test_parts_that_are_not_text_are_refused(server, part, before):
    """Also by a server of a model that could see: only its language model runs."""
    response = server.chat(messages=[USER, {"role": "user", "content": [*before, part]}])
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == f"messages.1.content.{len(before)}.type"
    assert f"'{part['type']}'" in error["message"] and "no images" in error["message"]
    assert server.engine.generated == []


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ([[]], "prompt.0"),
        ([1, "a"], "prompt.1"),
        ([-1], "prompt.0"),
        (None, "prompt"),
        ("", "prompt"),
    ],
)
def test_wrong_prompt_is_400(server, prompt, param):
    response = server.complete(prompt)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"].startswith("prompt")
    assert server.engine.generated == []


def test_id_outside_the_vocabulary(server):
    assert error_of(server.complete([3072]))["param"] == "prompt"
    response = server.client.post("/detokenize", json={"tokens": [3072]})
    assert response.status_code == 400
    assert error_of(response)["param"] == "tokens"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": 1e999}',
        b'"text"',
        b"[1]",
    ],
)
def test_body_that_is_not_a_json_object_is_400(server, body):
    response = server.client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error_of(response)


def test_another_content_type_is_400(server):
    body = json.dumps({"prompt": "a"})
    response = server.client.post("/v1/completions", content=body, headers={"content-type": "text/plain"})
    assert response.status_code == 400
    error_of(response)


def test_unknown_model_is_404_everywhere(server):
    for response in (
        server.chat(model="gpt-4"),
        server.complete(model="gpt-4"),
        server.client.post("/tokenize", json={"prompt": "a", "model": "gpt-4"}),
        server.client.post("/detokenize", json={"tokens": [1], "model": "gpt-4"}),
        server.client.get("/v1/models/gpt-4"),
        server.client.get("/v1/models/org/gpt-4"),
    ):
        assert response.status_code == 404
        assert error_of(response)["code"] == "model_not_found"
        assert error_of(response)["param"] == "model"


def test_too_long_is_400_context_length_exceeded(server, tokenizer):
    for response, param in [
        (server.complete([5] * 256), "prompt"),
        (server.complete([5] * 200, max_tokens=57), "max_tokens"),
        (server.chat(messages=[{"role": "user", "content": "word " * 300}]), "messages"),
    ]:
        assert response.status_code == 400
        assert error_of(response)["code"] == "context_length_exceeded"
        assert error_of(response)["param"] == param
    assert server.complete([5] * 200, max_tokens=56).status_code == 200


def test_unknown_path_and_method(server):
    missing = server.client.get("/v1/embeddings")
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "not_found"
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        wrong = server.client.get(path)
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "POST"
        assert error_of(wrong)["code"] == "method_not_allowed"
    assert server.client.post("/health").status_code == 405


def test_a_full_queue_is_429_and_all_or_nothing(serve, tokenizer):
    server = serve(None, max_queued=4)  # 4 running, 4 queued
    refused = server.chat(n=9)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert error_of(refused)["code"] == "queue_full"
    assert error_of(refused)["type"] == "rate_limit_error"
    assert server.engine.generated == []
    assert server.complete(["a"] * 3, n=3).status_code == 429
    assert server.engine.generated == []


def test_one_bad_prompt_of_several_leaves_nothing_behind(serve, tokenizer):
    server = serve(None)
    assert server.complete([[5], [6], [9999]]).status_code == 400
    assert server.engine.in_flight == 0
    assert sorted(server.engine.aborted) == [0, 1]
