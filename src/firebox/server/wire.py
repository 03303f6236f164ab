"""The request bodies. Every field is used or refused with 400: also an unknown one, or a wrong type.

Fields that OpenAI defines and that have no effect here are accepted only where having none is their
definition: `user`, `safety_identifier` and `prompt_cache_key` name the caller to an abuse monitor and a
router, which this server does not have; `metadata` labels stored completions and `store` may only be false,
because none are stored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from firebox.answer import SamplingParams
from firebox.errors import RequestError, UnsupportedField

MAX_CHOICES = 128
MAX_STOPS = 16  # OpenAI takes 4; evaluation harnesses send more
MAX_LOGPROBS = 20
COMPLETION_TOKENS = 16  # what OpenAI's /v1/completions generates when max_tokens is not given

Tokens = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=4096)]


class Body(BaseModel):
    """Strict types, no unknown field, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """`include_usage`: one more chunk before the end with the usage of the whole request."""

    include_usage: bool = False


class Sampled(Body):
    """What chat and plain completions have in common. None means the checkpoint's recommendation, else
    OpenAI's default.
    """

    model: str | None = Field(
        None, description="The served model's name; the only one there is when left out"
    )
    max_tokens: Tokens | None = None
    min_tokens: Tokens = 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(None, description="0 or -1: off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id, as a string, to what is added to its logit"
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="Choice i is drawn with seed + i"
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = Field(
        False, description="vLLM's: token_ids beside each piece of text, prompt_token_ids once"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = Field(0, description="Lower runs first")
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self

    def sampling(self, defaults: dict[str, float], **own: Any) -> SamplingParams:
        """The answer's parameters; a field that was not given takes the checkpoint's recommendation, if there
        is one.
        """
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        asked = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return SamplingParams(
            **{
                **defaults,
                **asked,
                "n": self.choices,
                "max_tokens": self.max_tokens,
                "min_tokens": self.min_tokens,
                "logit_bias": self._bias(),
                "seed": self.seed,
                "stop": self.stop,
                "stop_token_ids": self.stop_token_ids,
                "ignore_eos": self.ignore_eos,
                "include_stop_str_in_output": self.include_stop_str_in_output,
                "skip_special_tokens": self.skip_special_tokens,
                **own,
            }
        )

    def _bias(self) -> dict[int, float]:
        bias = {}
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise RequestError(
                    f"logit_bias has the key {key[:40]!r}, which is not a token id", param="logit_bias"
                )
            bias[int(key)] = value
        return bias


class TextPart(Body):
    """The only kind of content part there is."""

    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "text":
            raise ValueError(
                f"a content part is {value[:40]!r}; this server reads text: no images, video, audio, files"
            )
        return value


class ChatMessage(Body):
    """One message of a chat. `name`: passed to the template, as the participant's name."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class ResponseFormat(Body):
    """Only plain text."""

    type: Literal["text"]


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if (
            None not in (self.max_tokens, self.max_completion_tokens)
            and self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError(
                "max_tokens and max_completion_tokens differ; the former is the latter's old name"
            )
        return self

    def params(self, defaults: dict[str, float]) -> SamplingParams:
        """The answer's parameters."""
        return self.sampling(
            defaults,
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Tokens | None = COMPLETION_TOKENS
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    def params(self, defaults: dict[str, float]) -> SamplingParams:
        """The answer's parameters. Raises UnsupportedField for best_of."""
        if self.best_of not in (None, self.choices):
            raise UnsupportedField(
                f"best_of is {self.best_of} and n is {self.choices}; they must be equal", param="best_of"
            )
        return self.sampling(
            defaults,
            max_tokens=COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # one prompt as ids
        return list(self.prompt)  # strings or lists of ids


class TokenizeRequest(Body):
    """POST /tokenize: a prompt or a chat. `add_special_tokens` None: true for a prompt, false for a chat, as
    a completion does.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is None and self.add_generation_prompt is not None:
            raise ValueError("add_generation_prompt is only for messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError(
                "add_special_tokens is only for a prompt: the chat template writes special tokens itself"
            )
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


def message_dicts(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as the chat template sees them."""
    return [message.model_dump(exclude_none=True) for message in messages]
