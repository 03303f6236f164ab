"""A server and its closed-loop client, simulated step by step, and the claim that an honest benchmark would
make of the run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean

import numpy as np

from firebox.bench.claim import Claim, Spread

STEPS_S = 1e-4  # of a step without tokens, so that time always goes on


@dataclass
class Request:
    """What the client saw of one request: when it sent it, and when how many tokens came."""

    prompt_tokens: int
    output_tokens: int
    sent_s: float
    came: list[tuple[float, int]] = field(default_factory=list)
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.output_tokens

    def take(self, at_s: float, tokens: int) -> None:
        tokens = min(tokens, self.left)
        self.left -= tokens
        self.came.append((at_s, tokens))

    @property
    def e2e_s(self) -> float:
        return self.came[-1][0] - self.sent_s

    @property
    def ttft_s(self) -> float:
        return self.came[0][0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Server:
    """`step_s`: of a decode step, by batch; `prefill_tok_s`; each draft is accepted with `acceptance`, in
    order. Prompts hold up everyone else's step."""

    step_s: Callable[[int], float]
    prefill_tok_s: float
    drafts: int = 0
    acceptance: float = 0.0
    seed: int = 0

    def run(self, concurrency: int, lengths: Sequence[tuple[int, int]]) -> list[Request]:
        """A sweep over (prompt tokens, output tokens): the next one is sent when a place is free."""
        chance = random.Random(self.seed)
        waiting, active, done, now = list(lengths), [], [], 0.0
        while waiting or active:
            while waiting and len(active) < concurrency:
                active.append(Request(*waiting.pop(0), sent_s=now))
            now += self.step_s(len(active)) + STEPS_S
            new = [request for request in active if not request.came]
            now += sum(request.prompt_tokens for request in new) / self.prefill_tok_s
            for request in active:
                request.take(now, self._tokens(request, chance))
            done += [request for request in active if not request.left]
            active = [request for request in active if request.left]
        return done

    def _tokens(self, request: Request, chance: random.Random) -> int:
        if not request.came:
            return 1
        kept = 1
        while kept <= self.drafts and chance.random() < self.acceptance:
            kept += 1
        return kept


def claim_of(requests: Sequence[Request], concurrency: int, server: Server) -> Claim:
    """Everything that can be measured of a run, honestly."""
    duration = max(request.came[-1][0] for request in requests)
    output = sum(request.output_tokens for request in requests)
    prompts = sum(request.prompt_tokens for request in requests)
    gaps = [b[0] - a[0] for request in requests for a, b in zip(request.came, request.came[1:], strict=False)]
    tokens = [n for request in requests for _, n in request.came[1:]]
    return Claim(
        concurrency=concurrency,
        requests=len(requests),
        duration_s=duration,
        requests_per_s=len(requests) / duration,
        output_tok_s=output / duration,
        input_tok_s=prompts / duration,
        total_tok_s=(output + prompts) / duration,
        output_tok_s_sum=concurrency * mean(1 / request.tpot_s for request in requests),
        request_tok_s=mean(1 / request.tpot_s for request in requests),
        peak_tok_s=_peak(requests, duration),
        ttft_ms=_spread([request.ttft_s for request in requests]),
        tpot_ms=_spread([request.tpot_s for request in requests]),
        itl_ms=_spread(gaps),
        e2e_ms=_spread([request.e2e_s for request in requests]),
        input_tokens=prompts / len(requests),
        output_tokens=output / len(requests),
        total_input_tokens=prompts,
        total_output_tokens=output,
        server_output_tokens=output,
        drafts=server.drafts,
        accept_length=mean(tokens) if server.drafts else None,
    )


def _spread(seconds: Sequence[float]) -> Spread:
    p50, p90, p95, p99 = (float(v) * 1000 for v in np.percentile(seconds, (50, 90, 95, 99)))
    return Spread(mean=mean(seconds) * 1000, p50=p50, p90=p90, p95=p95, p99=p99)


def _peak(requests: Sequence[Request], duration: float) -> float:
    """Of a window of one second; of a shorter run its rate."""
    events = sorted(event for request in requests for event in request.came)
    times, counts = np.array([t for t, _ in events]), np.cumsum([0, *(n for _, n in events)])
    ends = np.searchsorted(times, times + 1.0, side="right")
    return float(max(counts[ends] - counts[:-1])) / min(1.0, duration)
