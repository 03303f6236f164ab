"""What the server process and an engine process say to each other: msgspec structs in MessagePack over
ZeroMQ.

Server to engine: Generate, Abort, Drain. Engine to server: Ready once (or Failed), then one Outputs per step.
Nothing here knows text: ids in, ids out. No pickle.
"""

from __future__ import annotations

from typing import Any

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens, and when to stop; `engine.limits.validate` checks the ranges when a request is
    submitted.

    `max_tokens` None: up to the context's end. `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p`
    0 switch those filters off. `logprobs`: how many top alternatives to report beside each chosen token (0:
    only the chosen one; None: none). `prompt_logprobs`: likewise for every prompt token but the first.
    Logprobs are those of the model, before temperature, penalties, bias and filters. `seed` makes the sample
    a function of (seed, position) alone, whatever the batch; None: a random one is chosen on submission.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """One position's logprobs: the token that stands there, its logprob and rank (0 = most likely), and the
    top alternatives."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class Generate(msgspec.Struct, frozen=True, tag=True):
    """A new request. `priority`: lower runs first; equal ones first come, first served."""

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget these requests and free their pages at once. Unknown ids are ignored: they may just have
    finished."""

    request_ids: list[int]


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Finish what is queued and running, then end the process."""


class Delta(msgspec.Struct, frozen=True):
    """What one step added to one request.

    `finish_reason`: "stop" (an end-of-sequence or stop token, which is the last of `ids`), "length" or
    "error" on the last delta, else None. `error`: what went wrong. `stop_token_id`: the token that stopped
    it. `cached_tokens`: prompt tokens taken from the prefix cache, on the first delta. `prompt_logprobs`: on
    the first delta if asked for; None stands for the first token, which has none.
    """

    request_id: int
    ids: list[int]
    finish_reason: str | None = None
    stop_token_id: int | None = None
    cached_tokens: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None


class Progress(msgspec.Struct, frozen=True):
    """How far a long prompt's prefill has come, for progress bars."""

    request_id: int
    computed_tokens: int
    prompt_tokens: int


class Stats(msgspec.Struct, frozen=True):
    """The engine's counters and gauges at the end of a step; counters only grow."""

    running_requests: int = 0
    waiting_requests: int = 0
    kv_pages_total: int = 0
    kv_pages_free: int = 0
    kv_pages_cached: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    retractions: int = 0
    aborted_requests: int = 0
    finished_requests: int = 0
    failed_requests: int = 0
    step_seconds: float = 0.0
    step_modes: dict[str, int] = {}  # "graph/…" or "eager/…", and why → steps


class Captured(msgspec.Struct, frozen=True):
    """A CUDA graph of decode steps of `requests` requests: the GPU's memory that went (the first of many may
    take a whole block of which later ones have theirs), and how long the step waited for it. `error`: why
    there is none."""

    requests: int
    bytes: int
    seconds: float
    error: str | None = None


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """Everything one step produced."""

    deltas: list[Delta]
    stats: Stats
    progress: list[Progress] = []
    captured: list[Captured] = []


class LoadProgress(msgspec.Struct, frozen=True, tag=True):
    """How far loading has come, in bytes of weights."""

    loaded_bytes: int
    total_bytes: int


class LedgerRow(msgspec.Struct, frozen=True):
    """One operation, or one launch of it, over one range of token counts: which kernel runs it and why.

    An operation's row (`op` "moe_block") says who was chosen, and why the others (`losers`) were not;
    `fallback`: nobody asked for torch. A launch's row (`op` "moe_block/experts/moe_gate_up") is one compile
    of the launch plan: `losers` are the paths that so many tokens do not take, `config` its tile,
    `shared_bytes` a block of the `limit_bytes` that it may ask for, `instruction` the dominant tensor
    instruction as read back, `native`: the one that the kernel is written for. `mode`: how decode steps of so
    many tokens launch it, "graph" or "eager" (steps with prompts are always eager). `how` its tile was found:
    "tuned", "predicted" or "default". `layers` it runs in. What a CPU runs, and a library's kernel, has no
    numbers (None)."""

    op: str
    tokens: tuple[int, int]
    kernel: str
    format: str
    why: str
    losers: dict[str, str] = {}
    fallback: bool = False
    config: dict[str, Any] = {}
    shared_bytes: int | None = None
    limit_bytes: int | None = None
    instruction: str | None = None
    native: bool | None = None
    mode: str = "eager"
    how: str | None = None
    layers: int | None = None


class Memory(msgspec.Struct, frozen=True):
    """A line of the memory budget: bytes that were planned with before anything was loaded, and why so many;
    bytes that were taken when the engine was ready, None where nothing can tell."""

    what: str
    budget_bytes: int
    measured_bytes: int | None
    why: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine is loaded. `eos_token_ids` end a request unless it says ignore_eos. `reasons`: one per
    derived setting. `memory`: the budget and what became of it."""

    model_type: str
    device: str
    dtype: str
    vocab_size: int
    context_tokens: int
    max_running_requests: int
    kv_pages: int
    page_tokens: int
    weights_bytes: int
    kv_bytes_per_token: int
    eos_token_ids: list[int]
    ledger: list[LedgerRow]
    reasons: list[str]
    load_seconds: float
    memory: list[Memory] = []
    captured: list[Captured] = []


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Start-up failed on a user's mistake: the error's class name (see errors.py), message and hint."""

    error: str
    message: str
    hint: str | None


ToEngine = Generate | Abort | Drain
FromEngine = Ready | Failed | LoadProgress | Outputs
