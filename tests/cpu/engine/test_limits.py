"""Every range that a request must keep to, at its borders, and how prompt and answer share the context."""

from __future__ import annotations

import math
from typing import Any

import pytest
from msgspec.structs import replace

from firebox.engine.limits import validate
from firebox.engine.messages import Ready, SamplingParams
from firebox.errors import ContextTooLong, RequestError

VOCAB = 100
CONTEXT = 32
READY = Ready(
    model_type="glm4_moe",
    device="cpu",
    dtype="float32",
    vocab_size=VOCAB,
    context_tokens=CONTEXT,
    max_running_requests=4,
    kv_pages=8,
    page_tokens=4,
    weights_bytes=0,
    kv_bytes_per_token=0,
    eos_token_ids=[0],
    ledger=[],
    reasons=[],
    load_seconds=0.0,
)
ABOVE = math.nextafter
NAN = math.nan

# field, values that are accepted, values that are refused
RANGES: list[tuple[str, list[Any], list[Any]]] = [
    ("max_tokens", [0, 1, CONTEXT - 1, None], [-1]),
    ("min_tokens", [0, 1, 10**6], [-1]),
    ("temperature", [0.0, 1e-300, 2.0], [-1e-9, ABOVE(2.0, 3.0), NAN, math.inf]),
    ("top_p", [1e-9, 0.5, 1.0], [0.0, -0.1, ABOVE(1.0, 2.0), NAN]),
    ("top_k", [0, 1, VOCAB, VOCAB + 1, 2**31 - 1], [-1, 2**31]),
    ("min_p", [0.0, 0.5, 1.0], [-1e-9, ABOVE(1.0, 2.0), NAN]),
    ("repetition_penalty", [1e-3, 1.0, 10.0], [0.0, -1.0, ABOVE(10.0, 11.0), NAN]),
    ("presence_penalty", [-2.0, 0.0, 2.0], [ABOVE(-2.0, -3.0), ABOVE(2.0, 3.0), NAN]),
    ("frequency_penalty", [-2.0, 0.0, 2.0], [ABOVE(-2.0, -3.0), ABOVE(2.0, 3.0), NAN]),
    ("logprobs", [None, 0, 20], [-1, 21]),
    ("prompt_logprobs", [None, 0, 20], [-1, 21]),
    (
        "logit_bias",
        [{}, {0: -100.0}, {VOCAB - 1: 100.0}],
        [
            {-1: 0.0},
            {VOCAB: 0.0},
            {3: ABOVE(100.0, 101.0)},
            {3: ABOVE(-100.0, -101.0)},
            {3: NAN},
            {1: 0.0, VOCAB: 0.0},
        ],
    ),
    ("stop_token_ids", [(), (0, VOCAB - 1)], [(-1,), (VOCAB,), (0, VOCAB)]),
    ("seed", [0, -(2**63), 2**64 - 1], [-(2**63) - 1, 2**64]),
]


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, accepted, _ in RANGES for value in accepted], ids=str
)
def test_accepted(field: str, value: Any) -> None:
    found = validate([1], SamplingParams(**{"max_tokens": 3, "seed": 5, field: value}), READY)
    if value is not None:
        assert found == SamplingParams(**{"max_tokens": 3, "seed": 5, field: value}), (
            "something else was changed"
        )


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, _, refused in RANGES for value in refused], ids=str
)
def test_refused(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        validate([1], replace(SamplingParams(max_tokens=3), **{field: value}), READY)
    assert caught.value.param == field and caught.value.code == "invalid_value"


def test_every_field_has_a_range_or_needs_none() -> None:
    assert {field for field, _, _ in RANGES} == set(SamplingParams.__struct_fields__) - {"ignore_eos"}


def test_the_refusal_names_the_value() -> None:
    for field, value, words in (
        ("logit_bias", {123: 1.0}, "123"),
        ("logit_bias", {7: 101.0}, "token 7 101.0"),
        ("stop_token_ids", (5, 777), "777"),
    ):
        with pytest.raises(RequestError, match=words):
            validate([1], SamplingParams(**{field: value}), READY)


# ---- the prompt


@pytest.mark.parametrize("token_id", [-1, VOCAB, 2**40])
def test_token_ids_outside_the_vocabulary(token_id: int) -> None:
    for prompt in ([token_id], [1, token_id], [token_id, 1]):
        with pytest.raises(RequestError, match=rf"token id {token_id};.*{VOCAB}") as caught:
            validate(prompt, SamplingParams(), READY)
        assert caught.value.param == "prompt"


def test_the_first_and_last_token_of_the_vocabulary() -> None:
    assert validate([0, VOCAB - 1], SamplingParams(), READY).max_tokens == CONTEXT - 2


def test_an_empty_prompt() -> None:
    with pytest.raises(RequestError, match="empty") as caught:
        validate([], SamplingParams(), READY)
    assert caught.value.param == "prompt" and not isinstance(caught.value, ContextTooLong)


# ---- the context


@pytest.mark.parametrize("prompt_tokens", range(1, CONTEXT))
def test_prompt_and_answer_may_fill_the_context_and_no_more(prompt_tokens: int) -> None:
    prompt, room = [1] * prompt_tokens, CONTEXT - prompt_tokens
    assert validate(prompt, SamplingParams(max_tokens=room), READY).max_tokens == room
    assert validate(prompt, SamplingParams(), READY).max_tokens == room, "the default is what is left"
    assert validate(prompt, SamplingParams(max_tokens=0), READY).max_tokens == 0
    with pytest.raises(
        ContextTooLong, match=rf"{prompt_tokens} tokens.*{CONTEXT + 1} in all.* {CONTEXT}"
    ) as caught:
        validate(prompt, SamplingParams(max_tokens=room + 1), READY)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")


@pytest.mark.parametrize("prompt_tokens", [CONTEXT, CONTEXT + 1, 10 * CONTEXT])
@pytest.mark.parametrize("max_tokens", [None, 0, 1])
def test_a_prompt_that_leaves_no_room(prompt_tokens: int, max_tokens: int | None) -> None:
    with pytest.raises(ContextTooLong, match=f"{prompt_tokens} tokens.*{CONTEXT}") as caught:
        validate([1] * prompt_tokens, SamplingParams(max_tokens=max_tokens), READY)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


# ---- the seed


def test_a_request_without_a_seed_gets_its_own() -> None:
    seeds = [validate([1], SamplingParams(), READY).seed for _ in range(50)]
    assert len(set(seeds)) == 50 and all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


def test_a_seed_of_0_is_kept() -> None:
    assert validate([1], SamplingParams(seed=0), READY).seed == 0
