"""Streams as the servers of the field write them, cut at every byte."""

from __future__ import annotations

import json

import pytest

from firebox.bench._events import EventReader
from firebox.bench.base import Piece, Usage

VLLM = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {"reasoning_content": "Hm, ü. "}, "token_ids": [1, 2]}]},
    {"choices": [{"index": 0, "delta": {"content": "Yes 😀"}, "token_ids": [3], "finish_reason": "stop"}]},
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"accepted_prediction_tokens": 1},
        },
    },
]
LLAMA_CPP = [
    {"choices": [{"index": 0, "text": "one "}]},
    {
        "choices": [{"index": 0, "text": "two", "finish_reason": "length"}],
        "timings": {"prompt_n": 3, "cache_n": 5, "predicted_n": 2, "draft_n_accepted": 1},
    },
]


def stream(events: list[dict], ascii: bool = False) -> bytes:
    lines = [f"data: {json.dumps(event, ensure_ascii=ascii)}\r\n\r\n" for event in events]
    return b": a comment\n" + "".join([*lines, "data: [DONE]\n\n"]).encode()


def read(parts: list[bytes]) -> tuple[list[Piece], list[Usage], bool]:
    reader, pieces, usages = EventReader(), [], []
    for part in parts:
        for event in reader.feed(part):
            pieces += [piece] if (piece := event.piece(1.0)) else []
            usages += [usage] if (usage := event.count()) else []
    return pieces, usages, reader.done


VLLM_READ = (
    [Piece(1.0, "Hm, ü. ", True, (1, 2)), Piece(1.0, "Yes 😀", False, (3,))],
    [Usage(7, 3, 4, 1)],
    True,
)


def test_every_cut_reads_the_same() -> None:
    data = stream(VLLM)
    for cut in range(len(data)):
        assert read([data[:cut], data[cut:]]) == VLLM_READ, cut
    assert read([bytes([byte]) for byte in data]) == VLLM_READ


def test_llama_cpp_tells_its_count_in_timings() -> None:
    assert read([stream(LLAMA_CPP)]) == (
        [Piece(1.0, "one "), Piece(1.0, "two")],
        [Usage(8, 2, 5, 1)],
        True,
    )


def test_invalid_utf8_is_shown_not_lost() -> None:
    pieces, _, _ = read([b'data: {"choices": [{"text": "a\xff\xfe"}]}\n\n'])
    assert pieces == [Piece(1.0, "a\ufffd\ufffd")]


def test_logprobs_of_chats_and_of_completions() -> None:
    chat = {"delta": {"content": "ab"}, "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1.5}]}}
    plain = {"text": "ab", "logprobs": {"token_logprobs": [None, -0.25]}}
    pieces = read([stream([{"choices": [chat]}, {"choices": [plain]}])])[0]
    assert [piece.logprobs for piece in pieces] == [(-0.5, -1.5), (-0.25,)]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_both_names_of_reasoning(field: str) -> None:
    assert read([stream([{"choices": [{"delta": {field: "x"}}]}])])[0] == [Piece(1.0, "x", True)]


def test_an_error_in_mid_stream_is_seen() -> None:
    [event] = EventReader().feed(stream([{"error": {"message": "engine died"}}])[:-14])
    assert event.error == {"message": "engine died"}
