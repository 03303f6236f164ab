"""What a caller can ask of an answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from firebox.engine.client import SamplingParams as EngineParams
from firebox.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to answer, in vLLM's names. Ranges are checked when the request is submitted (see engine.limits).

    `n` answers, the i-th with `seed + i`. `max_tokens` None: up to the context's end. `top_k` 0 or -1: off.
    `logprobs`: how many alternatives to report beside each token. `stop` strings are not part of the text
    unless `include_stop_str_in_output`; they are looked for from the first token after `min_tokens` on.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def engine_params(self, choice: int) -> EngineParams:
        """What the engine needs to know for the choice-th answer."""
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}", param="min_tokens"
            )
        return EngineParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0) if self.top_k >= -1 else self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=None if self.seed is None else self.seed + choice,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )
