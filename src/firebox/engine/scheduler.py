"""Which tokens of which requests the next step computes. Pure Python; knows pages and counts, no tensors.

There are no phases: every running request has known tokens and computed tokens, and a step lets "computed"
catch up under a token budget. Decode (one token missing) comes first so that a long prompt never stalls the
others; what is left of the budget goes to prompts in chunks, then to waiting requests. When pages run out,
the youngest running request is retracted: it gives its pages back (full ones stay in the prefix tree while
there is room) and is computed again later. That is never an error.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from firebox.cache.kv_cache import Holding, KVCache
from firebox.engine.messages import Delta, Stats, TokenLogprobs
from firebox.engine.request import Request


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` … `start + count − 1` of a request. `samples`: they reach its last known token, so one
    more follows."""

    request: Request
    start: int
    count: int
    samples: bool

    @classmethod
    def of(cls, request: Request, count: int) -> Chunk:
        """The next `count` tokens of `request`."""
        samples = count == request.missing_tokens and request.params.max_tokens != 0
        return cls(request, request.computed_tokens, count, samples)


@dataclass(frozen=True)
class Plan:
    """One step: at least one chunk, at most one per request. `state_copies` (source slot, target slot) come
    first, in order."""

    chunks: tuple[Chunk, ...]
    state_copies: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(chunk.count for chunk in self.chunks)


@dataclass(frozen=True)
class Sampled:
    """What the runner found for one chunk: the next token if it samples, and logprobs where the request asks
    for them.

    `prompt_logprobs`: one per token of the chunk, of the token that follows it in the prompt.
    """

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Sequence[TokenLogprobs] = ()


class Scheduler:
    """Owns the requests and their pages. The engine's step is `plan()`, then `apply(plan, sampled)`."""

    def __init__(
        self,
        cache: KVCache,
        *,
        max_running_requests: int,
        max_batch_tokens: int,
        prefill_chunk_tokens: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        assert max_batch_tokens >= max_running_requests, (max_batch_tokens, max_running_requests)
        self.cache = cache
        self.running: list[Request] = []  # sorted by Request.order
        self._waiting: list[tuple[tuple[int, int], Request]] = []  # heap
        self._requests: dict[int, Request] = {}
        self._arrivals = 0
        self._max_running_requests = max_running_requests
        self._max_batch_tokens = max_batch_tokens
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._eos_token_ids = eos_token_ids
        self._copies_ahead: tuple[tuple[int, int], ...] = ()  # of the last plan that was made ahead
        self._counts = dict.fromkeys(
            ("steps", "prompt_tokens", "cached_prompt_tokens", "generated_tokens", "retractions"), 0
        )
        self._counts |= {"aborted_requests": 0, "finished_requests": 0, "failed_requests": 0}

    @property
    def has_work(self) -> bool:
        """Is anything running or waiting?"""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queues a request. It must fit the pool alone: prompt plus max_tokens ≤ all pages."""
        assert request.request_id not in self._requests, request.request_id
        self._arrivals += 1
        request.arrival = self._arrivals
        self._requests[request.request_id] = request
        heapq.heappush(self._waiting, (request.order, request))

    def seat(self, request: Request, computed_tokens: int) -> bool:
        """For measuring: starts a request whose first tokens count as computed, though nobody computed them
        and its pages hold whatever they held. False (and no change) when places or pages run out."""
        if len(self.running) >= self._max_running_requests:
            return False
        holding = self.cache.assume(computed_tokens)
        if holding is None:
            return False
        self._arrivals += 1
        request.arrival = self._arrivals
        request.holding, request.computed_tokens, request.cached_tokens = holding, computed_tokens, 0
        self._requests[request.request_id] = request
        bisect.insort(self.running, request, key=lambda running: running.order)
        return True

    def abort(self, request_id: int) -> None:
        """Forgets a request and frees its pages now. Unknown ids are ignored."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self._counts["aborted_requests"] += 1
        if request.holding is not None:
            self._stop_running(request)
        else:
            self._waiting = [entry for entry in self._waiting if entry[1] is not request]
            heapq.heapify(self._waiting)

    def fail(self, plan: Plan, why: str) -> list[Delta]:
        """Ends a plan's requests, whose step raised, and frees their pages. Nothing of that step is kept:
        what it may have written lies behind what counts as computed. A step planned ahead of it is void."""
        self.cache.distrust(plan.state_copies + self._copies_ahead)
        deltas = []
        for chunk in plan.chunks:
            request = chunk.request
            if self.is_running(request):
                self._counts["failed_requests"] += 1
                del self._requests[request.request_id]
                self._stop_running(request)
                deltas.append(Delta(request.request_id, [], finish_reason="error", error=why))
        return deltas

    def is_running(self, request: Request) -> bool:
        """False for one that has ended, was aborted, or waits."""
        return self._requests.get(request.request_id) is request and request.holding is not None

    def plan(self) -> Plan | None:
        """The next step, with the pages for it allocated; None when there is nothing to do."""
        chunks: dict[int, Chunk] = {}
        decoding = [request for request in self.running if request.missing_tokens == 1]
        prefilling = [request for request in self.running if request.missing_tokens > 1]
        budget_tokens = self._max_batch_tokens
        for request in decoding + prefilling:
            if (
                request.holding is None or budget_tokens == 0
            ):  # retracted a moment ago, or the budget is spent
                continue
            count = self._chunk_tokens(request, budget_tokens)
            if self._make_room(request, request.computed_tokens + count, chunks):
                chunks[request.request_id] = Chunk.of(request, count)
                budget_tokens -= count
        self._admit(chunks, budget_tokens)
        if not chunks:
            assert not self._requests, f"{len(self._requests)} requests and nothing to compute"
            return None
        self._copies_ahead = ()
        return Plan(tuple(chunks.values()), self._copies())

    def plan_ahead(self, plan: Plan) -> Plan | None:
        """The step after `plan` while `plan`'s tokens are not known: its requests, one token on, less those
        that it brings to their max_tokens. None where the tokens decide what comes: a prompt goes on,
        somebody could be admitted or moved up, pages run out. It must be launched, or taken back."""
        self._copies_ahead = ()
        if bool(self._waiting) and len(self.running) < self._max_running_requests:
            return None
        if any(chunk.count > 1 or not chunk.samples for chunk in plan.chunks):
            return None
        going_on = [chunk for chunk in plan.chunks if self._goes_on(chunk)]
        holdings = [chunk.request.holding for chunk in going_on]
        for chunk, holding in zip(going_on, holdings, strict=True):
            assert holding is not None
            if not self.cache.grow(holding, chunk.start + 2):
                return None
        if not going_on:
            return None
        for chunk, holding in zip(going_on, holdings, strict=True):
            assert holding is not None
            self.cache.foresee(holding, chunk.start + 1, chunk.request.prompt_tokens)
        self._copies_ahead = self._copies()
        return Plan(tuple(Chunk(c.request, c.start + 1, 1, True) for c in going_on), self._copies_ahead)

    def take_back(self, plan: Plan) -> None:
        """A plan made ahead that will not be launched: its copies belong to the next one."""
        self.cache.state_copies[:0] = plan.state_copies
        self._copies_ahead = ()

    def _copies(self) -> tuple[tuple[int, int], ...]:
        copies = tuple(self.cache.state_copies)
        self.cache.state_copies.clear()
        return copies

    def _goes_on(self, chunk: Chunk) -> bool:
        """Will this request need another token after this chunk's, as far as is known?"""
        request = chunk.request
        if not self.is_running(request):
            return False
        return chunk.start + 2 - request.prompt_tokens < (request.params.max_tokens or 0)

    def apply(self, plan: Plan, sampled: Sequence[Sampled]) -> list[Delta]:
        """Takes a step's results in: computed catches up, tokens are appended, finished requests leave. One
        delta per request that has something to report. Requests aborted since the plan was made are passed
        over."""
        deltas = []
        self._counts["steps"] += 1
        for chunk, result in zip(plan.chunks, sampled, strict=True):
            request = chunk.request
            if not self.is_running(request):
                continue
            assert request.holding is not None
            request.computed_tokens += chunk.count
            if request.params.prompt_logprobs is not None:
                self._keep_prompt_logprobs(request, chunk, result.prompt_logprobs)
            self.cache.commit(
                request.holding, request.token_ids, request.computed_tokens, request.prompt_tokens
            )
            if request.missing_tokens == 0:
                deltas.append(self._advance(request, result))
        return deltas

    def stats(self) -> Stats:
        """Counters and gauges as they stand."""
        counts: dict[str, Any] = self._counts
        return Stats(
            running_requests=len(self.running),
            waiting_requests=len(self._waiting),
            kv_pages_total=self.cache.allocator.total_pages,
            kv_pages_free=self.cache.allocator.free_pages,
            kv_pages_cached=self.cache.tree.pages,
            **counts,
        )

    def _make_room(self, request: Request, tokens: int, chunks: dict[int, Chunk]) -> bool:
        """Pages for `tokens` of a running request, retracting younger ones (and, last, itself) if they have
        run out."""
        assert request.holding is not None
        while not self.cache.grow(request.holding, tokens):
            victim = self.running[-1]
            chunks.pop(victim.request_id, None)
            self._retract(victim)
            if victim is request:
                assert self.running, f"{tokens} tokens do not fit the whole pool"
                return False
        return True

    def _admit(self, chunks: dict[int, Chunk], budget_tokens: int) -> None:
        """Starts waiting requests, in order, while there is budget and their known tokens fit without
        retracting anyone."""
        while self._waiting and budget_tokens > 0 and len(self.running) < self._max_running_requests:
            request = self._waiting[0][1]
            # the last known token must be computed, for its logits; with prompt logprobs, every token must
            most_cached = 0 if request.params.prompt_logprobs is not None else len(request.token_ids) - 1
            holding, cached_tokens = self.cache.acquire(request.token_ids, most_cached)
            if self.running and not self._fits(request, holding):
                self.cache.release(holding)
                return
            heapq.heappop(self._waiting)
            request.holding, request.computed_tokens = holding, cached_tokens
            bisect.insort(self.running, request, key=lambda running: running.order)
            if request.cached_tokens is None:
                request.cached_tokens = cached_tokens
                self._counts["prompt_tokens"] += request.prompt_tokens
                self._counts["cached_prompt_tokens"] += cached_tokens
            count = self._chunk_tokens(request, budget_tokens)
            grown = self.cache.grow(holding, cached_tokens + count)
            assert grown, (
                f"{cached_tokens + count} tokens do not fit the pool of request {request.request_id}"
            )
            chunks[request.request_id] = Chunk.of(request, count)
            budget_tokens -= count

    def _fits(self, request: Request, holding: Holding) -> bool:
        """Are there pages for all tokens the request knows, and one for each running request, which may need
        it soon? Otherwise the newcomer would be retracted at once."""
        known, headroom_pages = len(request.token_ids), len(self.running)
        pages = -(-known // self.cache.page_tokens) - len(holding.page_ids)
        if pages + headroom_pages > self.cache.available_pages:
            return False
        computed = len(holding.page_ids) * self.cache.page_tokens
        window_pages = self.cache.window_pages_for(
            computed, min(known, computed + self._prefill_chunk_tokens)
        )
        return not window_pages or window_pages + headroom_pages <= self.cache.available_window_pages

    def _chunk_tokens(self, request: Request, budget_tokens: int) -> int:
        """How many of its tokens a request computes next. Prompts of models with a recurrent state stop at
        the ends of pages, where the state can be kept for others."""
        count = min(request.missing_tokens, budget_tokens, self._prefill_chunk_tokens)
        if self.cache.has_states and count > 1:
            end = request.computed_tokens + count
            aligned = end - end % self.cache.page_tokens
            if aligned > request.computed_tokens:
                return aligned - request.computed_tokens
        return count

    def _advance(self, request: Request, result: Sampled) -> Delta:
        """All known tokens are computed: append the sampled one, if any, and see whether the request is
        done."""
        ids: list[int] = []
        finish_reason = stop_token_id = None
        if result.token_id is not None:
            request.token_ids.append(result.token_id)
            ids = [result.token_id]
            self._counts["generated_tokens"] += 1
            if self._stops(request, result.token_id):
                finish_reason, stop_token_id = "stop", result.token_id
        if finish_reason is None and request.output_tokens >= (request.params.max_tokens or 0):
            finish_reason = "length"
        first = request.output_tokens <= 1
        delta = Delta(
            request_id=request.request_id,
            ids=ids,
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            cached_tokens=request.cached_tokens if first else None,
            logprobs=[result.logprobs] if result.logprobs is not None else None,
            prompt_logprobs=request.prompt_logprobs
            if first and request.params.prompt_logprobs is not None
            else None,
        )
        if finish_reason is not None:
            self._counts["finished_requests"] += 1
            del self._requests[request.request_id]
            self._stop_running(request)
        return delta

    def _stops(self, request: Request, token_id: int) -> bool:
        if request.output_tokens < request.params.min_tokens:
            return False
        is_eos = token_id in self._eos_token_ids and not request.params.ignore_eos
        return is_eos or token_id in request.params.stop_token_ids

    @staticmethod
    def _keep_prompt_logprobs(request: Request, chunk: Chunk, found: Sequence[TokenLogprobs]) -> None:
        if chunk.start < request.prompt_tokens:
            # after a retraction the prompt is computed again: keep what is already there
            request.prompt_logprobs = request.prompt_logprobs or [None]
            have = len(request.prompt_logprobs) - 1
            request.prompt_logprobs += list(found)[max(0, have - chunk.start) :]

    def _retract(self, request: Request) -> None:
        self._counts["retractions"] += 1
        self._stop_running(request)
        heapq.heappush(self._waiting, (request.order, request))

    def _stop_running(self, request: Request) -> None:
        assert request.holding is not None
        self.running.remove(request)
        self.cache.release(request.holding)
        request.holding = None
        request.computed_tokens = 0
