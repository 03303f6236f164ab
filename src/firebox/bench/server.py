"""What server this is: the model it serves, which optional fields it takes, and its own counters.

Servers differ in what they accept beside OpenAI's fields. One short request with all of them tells; a field
that is refused by name is left out from then on, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from firebox.bench.base import Ask
from firebox.bench.client import Target
from firebox.errors import ConfigError

TIMEOUT_S = 120
OPTIONAL = {
    "return_token_ids": "ids",
    "logprobs": "logprobs",
    "ignore_eos": "exact_length",
    "stream_options": "usage",
}

# Counters of the servers of the field, by what they count.
COUNTERS = {
    "generated_tokens": (
        "firebox_generated_tokens_total",
        "vllm:generation_tokens_total",
        "sglang:generation_tokens_total",
        "llamacpp:tokens_predicted_total",
    ),
    "prompt_tokens": (
        "firebox_prompt_tokens_total",
        "vllm:prompt_tokens_total",
        "sglang:prompt_tokens_total",
        "llamacpp:prompt_tokens_total",
    ),
    "accepted_drafts": ("vllm:spec_decode_num_accepted_tokens_total",),
    "drafts": ("vllm:spec_decode_num_drafts_total",),
}


class Silent(ConfigError):
    """The server takes a request and does not answer it."""


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """`context_tokens`: the longest request, None where /v1/models does not tell. `notes`: what the server
    would not take."""

    target: Target
    context_tokens: int | None
    notes: tuple[str, ...]


def connect(url: str, api_key: str | None = None, timeout_s: float = TIMEOUT_S) -> httpx.Client:
    """For the few calls around a measurement."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return httpx.Client(base_url=base_url(url), headers=headers, timeout=timeout_s)


def base_url(url: str) -> str:
    """`url` without the /v1 that users often paste with it."""
    return url.rstrip("/").removesuffix("/v1")


def discover(
    http: httpx.Client,
    *,
    model: str | None = None,
    chat: bool = False,
    api_key: str | None = None,
    fields: Mapping[str, Any] | None = None,
    logprobs: bool = False,
) -> Server:
    """Asks the server what it is. Raises ConfigError when nothing answers there, when it does not serve
    `model`, or refuses a plain request; Silent when it never answers one. `logprobs`: whether they are
    wanted."""
    try:
        reply = http.get("/v1/models")
        reply.raise_for_status()
        cards = reply.json()["data"]
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{http.base_url} does not answer as an OpenAI-compatible server: {error}",
            hint="give the address before /v1, such as http://127.0.0.1:30000",
        ) from error
    names = [str(card["id"]) for card in cards]
    if (wanted := model or (names[0] if names else None)) not in names:
        raise ConfigError(f"{http.base_url} serves no model {wanted!r}; it serves {', '.join(names)}")
    card = cards[names.index(str(wanted))]
    target = Target(
        url=str(http.base_url).rstrip("/"),
        model=str(wanted),
        chat=chat,
        api_key=api_key,
        fields=fields or {},
        ids=True,
        logprobs=logprobs,
    )
    target, notes = _settle(http, target)
    return Server(target=target, context_tokens=_context(card), notes=tuple(notes))


def _context(card: Mapping[str, Any]) -> int | None:
    found = card.get("max_model_len") or (card.get("meta") or {}).get("n_ctx")
    return None if found is None else int(found)


def _settle(http: httpx.Client, target: Target) -> tuple[Target, list[str]]:
    """The target with only the optional fields that the server takes."""
    notes: list[str] = []
    for _ in range(len(OPTIONAL) + 1):
        route = "chat/completions" if target.chat else "completions"
        try:
            plain = Ask(max_tokens=2, prompt="Hello", logprobs=True)
            reply = http.post(f"/v1/{route}", json=target.body(plain))
        except httpx.TimeoutException as error:
            raise Silent(f"{target.url} does not answer a plain request: {error}") from error
        except httpx.HTTPError as error:
            raise ConfigError(f"{target.url} breaks off a plain request: {error}") from error
        if reply.status_code == 200:
            return target, notes
        if reply.status_code not in (400, 422):
            break
        refused = next((name for name in OPTIONAL if name in reply.text), None)
        if refused is None or not getattr(target, OPTIONAL[refused]):
            break
        target = msgspec.structs.replace(target, **{OPTIONAL[refused]: False})
        notes.append(f"the server refuses {refused}")
    raise ConfigError(f"{target.url} refuses a plain request: HTTP {reply.status_code}: {reply.text[:300]}")


def counters(http: httpx.Client) -> dict[str, float]:
    """The server's counters by the names of COUNTERS, as far as /metrics has them; {} without /metrics."""
    try:
        reply = http.get("/metrics")
        reply.raise_for_status()
    except httpx.HTTPError:
        return {}
    samples: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(reply.text):
            for sample in family.samples:
                samples[sample.name] = samples.get(sample.name, 0.0) + sample.value
    except ValueError:
        return {}
    return {what: samples[name] for what, known in COUNTERS.items() for name in known if name in samples}
