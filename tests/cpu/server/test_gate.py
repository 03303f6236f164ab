from __future__ import annotations

import json

import pytest

from tests.cpu.server.conftest import Served, error_of, says


@pytest.fixture
def keyed(serve, tokenizer) -> Served:
    return serve(says(tokenizer, "x"), api_key="sésame")


def test_key_is_needed_but_for_health_and_metrics(keyed):
    for path in ("/v1/models", "/ledger"):
        assert keyed.client.get(path).status_code == 401
    for response in (keyed.chat(), keyed.complete(), keyed.client.post("/tokenize", json={"prompt": "a"})):
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
    assert keyed.client.get("/health").status_code == 200
    assert keyed.client.get("/metrics").status_code == 200
    assert keyed.engine.generated == []


def test_only_the_right_key_enters(keyed):
    for header in ("Bearer wrong", "sésame", "bearer sésame", "Bearer sésame2", "Basic sésame"):
        assert keyed.client.get("/v1/models", headers={"authorization": header.encode()}).status_code == 401
    right = keyed.client.get("/v1/models", headers={"authorization": "Bearer sésame".encode()})
    assert right.status_code == 200


def test_body_at_the_limit_enters_and_one_byte_more_is_413(serve, tokenizer):
    server = serve(says(tokenizer, "x"), max_body_bytes=1000)
    headers = {"content-type": "application/json"}
    body = json.dumps({"prompt": "a"}).encode()
    full = body + b" " * (1000 - len(body))
    assert server.client.post("/v1/completions", content=full, headers=headers).status_code == 200
    refused = server.client.post("/v1/completions", content=full + b" ", headers=headers)
    assert refused.status_code == 413
    assert error_of(refused)["code"] == "body_too_large"


def test_chunked_body_is_counted_while_it_comes(serve, tokenizer):
    """No Content-Length, and an end that never comes: the answer must not wait for it."""
    server = serve(says(tokenizer, "x"), max_body_bytes=1000)
    with server.socket() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            connection.sendall(b"190\r\n" + b" " * 400 + b"\r\n")
        head = connection.recv(4096)
    assert head.startswith(b"HTTP/1.1 413 ")
    assert server.complete().status_code == 200


def test_announced_length_is_enough_to_refuse(serve, tokenizer):
    server = serve(says(tokenizer, "x"), max_body_bytes=1000)
    with server.socket() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1001\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_small_chunked_body_works(serve, tokenizer):
    server = serve(says(tokenizer, "x"))
    parts = iter([b'{"prom', b'pt": "a"}'])
    response = server.client.post(
        "/v1/completions", content=parts, headers={"content-type": "application/json"}
    )
    assert response.status_code == 200
