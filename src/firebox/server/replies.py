"""The response bodies, as the OpenAPI document describes them and as they are written."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


def _is_none(value: object) -> bool:
    return value is None


def only_when_asked() -> Any:
    """A field that stands in a reply only if it has a value."""
    return Field(None, exclude_if=_is_none)


class PromptTokensDetails(BaseModel):
    """`cached_tokens`: prompt tokens whose KV pages were already there."""

    cached_tokens: int


class Usage(BaseModel):
    """Exact counts. A prompt counts once, however many answers it got."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatMessageReply(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class TopLogprob(BaseModel):
    """One candidate for a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that stands at a position, and the most likely ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each generated token."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    """One of n."""

    index: int
    message: ChatMessageReply
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = only_when_asked()


class ChatCompletion(BaseModel):
    """The reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = only_when_asked()


class CompletionLogprobs(BaseModel):
    """Parallel lists over tokens. The first token of an echoed prompt has no logprob. Offsets count
    characters of `text`.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of n for each prompt: index = prompt × n + choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = only_when_asked()
    prompt_token_ids: list[int] | None = only_when_asked()


class Completion(BaseModel):
    """The reply of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    """`max_model_len`: tokens a request may hold, prompt and answer."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "firebox"
    max_model_len: int


class ModelList(BaseModel):
    """The reply of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(BaseModel):
    """The reply of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """The reply of /detokenize."""

    prompt: str


class Health(BaseModel):
    """The reply of /health while the engine lives."""

    status: Literal["ok"] = "ok"


class LedgerReply(BaseModel):
    """The reply of /ledger: what runs (`ledger`), with which settings, why (`reasons`), in which versions, in
    how much memory: bytes of the budget, and measured; and the graphs captured by now."""

    model: str
    versions: dict[str, str]
    settings: dict[str, Any]
    reasons: list[str]
    ledger: list[dict[str, Any]]
    memory: list[dict[str, Any]]
    graphs: list[dict[str, Any]]


class ErrorDetail(BaseModel):
    """What was wrong; `param`: the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every error's body."""

    error: ErrorDetail


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route for these statuses."""
    return {status: {"model": ErrorReply} for status in statuses}


POST_ERRORS = errors(400, 401, 404, 413, 429, 503)
GET_ERRORS = errors(401)
