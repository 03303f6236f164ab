"""What a row of measurements states, and what a law says of it.

Every field of a `Claim` is optional: tables state a few. Nothing is derived when it is filled; the laws do
that, and are silent where they lack something.
"""

from __future__ import annotations

import msgspec


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """One quantity over all requests of a row. A column that does not say what it is counts as `mean`."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One row. Rates are of all requests together unless they say otherwise, and only of requests that
    succeeded.

    concurrency           requests in flight at once, as the row is labelled
    concurrency_limit     the most that were allowed; the run may have had fewer
    requests              how many were measured;  duration_s from the first one sent to the last one ended
    output_tok_s          wall: output tokens over duration;  input_tok_s, total_tok_s likewise
    output_tok_s_sum      the mean rate of a request times the requests at once
    decode_tok_s          over the time in which tokens come: the wait for the first one is left out
    request_tok_s         the mean rate of one request, after its first token or over all of its time
    peak_tok_s            output in the best second
    prefill_tok_s         prompt tokens over the time until the first token, less any overhead
    ttft_ms, tpot_ms      to the first token; a token after that, (e2e − ttft) / (output tokens − 1)
    itl_ms                between two events of a stream; with speculation one brings several tokens
    e2e_ms                from sending to the last token
    input_tokens, output_tokens    of one request, on average; as asked for, where it is not known
    depth_tokens          in the context before the prompt, sent again or already cached
    total_input_tokens, total_output_tokens    of all requests
    drafts, accept_length draft positions a step; tokens a step and request, 1 without speculation
    server_output_tokens  what the server's own counter moved by meanwhile
    roof_tok_s            what memory bandwidth allows at this concurrency, drafts included
    roof_request_tok_s    what it allows one request, drafts included
    prefill_roof_tok_s    what matrix units allow
    """

    concurrency: float | None = None
    concurrency_limit: float | None = None
    requests: float | None = None
    duration_s: float | None = None
    requests_per_s: float | None = None
    output_tok_s: float | None = None
    output_tok_s_sum: float | None = None
    decode_tok_s: float | None = None
    request_tok_s: float | None = None
    peak_tok_s: float | None = None
    input_tok_s: float | None = None
    total_tok_s: float | None = None
    prefill_tok_s: float | None = None
    ttft_ms: Spread = Spread()
    tpot_ms: Spread = Spread()
    itl_ms: Spread = Spread()
    e2e_ms: Spread = Spread()
    input_tokens: float | None = None
    output_tokens: float | None = None
    depth_tokens: float | None = None
    total_input_tokens: float | None = None
    total_output_tokens: float | None = None
    drafts: float | None = None
    accept_length: float | None = None
    server_output_tokens: float | None = None
    roof_tok_s: float | None = None
    roof_request_tok_s: float | None = None
    prefill_roof_tok_s: float | None = None

    @property
    def in_flight(self) -> float | None:
        """The most requests that can have been in flight; a zero says nothing."""
        known = [n for n in (self.concurrency, self.concurrency_limit) if n]
        return min(known) if known else None


class Ruling(msgspec.Struct, frozen=True, kw_only=True):
    """What a law says of a claim. `factor`: how far beyond `implied`, the border, `claimed` is; below 1 it is
    on the right side. `verdict`: possible, suspicious or impossible. `why`: one sentence with the numbers.
    """

    law: str
    claimed: float
    implied: float
    factor: float
    verdict: str
    why: str

    @property
    def broken(self) -> bool:
        """Whether the claim is on the wrong side, tolerance included."""
        return self.verdict != "possible"
