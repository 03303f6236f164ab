"""The ranges a request must keep to. Checked where it is submitted, so that the engine never sees a wrong
one."""

from __future__ import annotations

import random

import msgspec

from firebox.engine.messages import Ready, SamplingParams
from firebox.errors import ContextTooLong, RequestError

MAX_LOGPROBS = 20


def validate(prompt_ids: list[int], params: SamplingParams, ready: Ready) -> SamplingParams:
    """Returns `params` with `max_tokens` and, if absent, a random `seed` filled in.

    Raises RequestError, naming the field, or ContextTooLong.
    """
    _require(len(prompt_ids) > 0, "prompt", "is empty; the model needs at least one token")
    for token_id in prompt_ids:
        _require(
            0 <= token_id < ready.vocab_size,
            "prompt",
            f"has token id {token_id}; the vocabulary ends at {ready.vocab_size}",
        )
    _ranges(params, ready.vocab_size)

    room_tokens = ready.context_tokens - len(prompt_ids)
    if room_tokens < 1:
        raise ContextTooLong(
            f"the prompt has {len(prompt_ids)} tokens; "
            f"the context is {ready.context_tokens}, of which one must be free",
            param="prompt",
        )
    if params.max_tokens is not None and params.max_tokens > room_tokens:
        raise ContextTooLong(
            f"the prompt has {len(prompt_ids)} tokens and max_tokens is {params.max_tokens}: "
            f"{len(prompt_ids) + params.max_tokens} in all; the context is {ready.context_tokens}",
            param="max_tokens",
        )
    return msgspec.structs.replace(
        params,
        max_tokens=room_tokens if params.max_tokens is None else params.max_tokens,
        seed=random.getrandbits(63) if params.seed is None else params.seed,
    )


def _ranges(params: SamplingParams, vocab_size: int) -> None:
    _require(params.max_tokens is None or params.max_tokens >= 0, "max_tokens", "must be at least 0")
    _require(params.min_tokens >= 0, "min_tokens", "must be at least 0")
    _require(0.0 <= params.temperature <= 2.0, "temperature", "must be between 0 and 2")
    _require(0.0 < params.top_p <= 1.0, "top_p", "must be above 0 and at most 1")
    _require(0 <= params.top_k < 2**31, "top_k", "must be at least 0 (0 switches it off), and fit 32 bits")
    _require(0.0 <= params.min_p <= 1.0, "min_p", "must be between 0 and 1")
    _require(0.0 < params.repetition_penalty <= 10.0, "repetition_penalty", "must be above 0 and at most 10")
    _require(-2.0 <= params.presence_penalty <= 2.0, "presence_penalty", "must be between -2 and 2")
    _require(-2.0 <= params.frequency_penalty <= 2.0, "frequency_penalty", "must be between -2 and 2")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        _require(count is None or 0 <= count <= MAX_LOGPROBS, name, f"must be between 0 and {MAX_LOGPROBS}")
    for token_id, bias in params.logit_bias.items():
        _require(
            0 <= token_id < vocab_size,
            "logit_bias",
            f"names token {token_id}; the vocabulary ends at {vocab_size}",
        )
        _require(
            -100.0 <= bias <= 100.0,
            "logit_bias",
            f"gives token {token_id} {bias}; it must be between -100 and 100",
        )
    for token_id in params.stop_token_ids:
        _require(
            0 <= token_id < vocab_size,
            "stop_token_ids",
            f"names token {token_id}; the vocabulary ends at {vocab_size}",
        )
    _require(params.seed is None or -(2**63) <= params.seed < 2**64, "seed", "must fit 64 bits")


def _require(holds: bool, param: str, sentence: str) -> None:
    if not holds:
        raise RequestError(f"{param} {sentence}", param=param)
