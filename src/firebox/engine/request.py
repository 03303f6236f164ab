"""One request inside the engine: its known tokens, how many of them are computed, and the pages it holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from firebox.cache.kv_cache import Holding
from firebox.engine.messages import SamplingParams, TokenLogprobs


@dataclass(eq=False)
class Request:
    """There are no phases. A request has `token_ids` it knows (prompt, then output) and the first
    `computed_tokens` of them in the KV cache; a step computes more of them, and when the last known one is
    computed, the next one is sampled.

    `arrival` orders equal priorities. `holding` is None while the request waits. `reported_tokens`: how much
    of the output has been sent. `cached_tokens`: prompt tokens found in the prefix cache when it was first
    admitted.
    """

    request_id: int
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    arrival: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    holding: Holding | None = None
    cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.token_ids)

    @property
    def output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def missing_tokens(self) -> int:
        """Known tokens that are not computed yet; 1 in steady decode."""
        return len(self.token_ids) - self.computed_tokens

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: lower priority number, then earlier arrival. The greatest is retracted first."""
        return (self.priority, self.arrival)
