"""The scheduler under random traffic, with a runner that computes nothing but checks everything.

The fake model's next token is a hash of all tokens so far, so any mistake in what was computed, in which
order, or after a retraction changes the output; the expected output of each request is computed alone, up
front.
"""

from __future__ import annotations

import random

import pytest

from firebox.cache.kv_cache import CacheSizes, KVCache
from firebox.engine.messages import Delta, SamplingParams
from firebox.engine.request import Request
from firebox.engine.scheduler import Plan, Sampled, Scheduler

PAGE_TOKENS = 4
EOS = 999


def next_token(token_ids: list[int]) -> int:
    """The fake model: depends on every token before."""
    value = 17
    for token_id in token_ids:
        value = (value * 31 + token_id + 7) % 1000003
    return value % 900


def expected_output(prompt: list[int], max_tokens: int) -> list[int]:
    """What a request must produce, whatever else runs."""
    token_ids = list(prompt)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]


class FakeRunner:
    """Keeps, for every slot of every page, the token written there, and reads contexts back from the
    pages."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}

    def run(self, plan: Plan) -> list[Sampled]:
        out = []
        for chunk in plan.chunks:
            request = chunk.request
            assert request.holding is not None
            pages = request.holding.page_ids
            for position in range(chunk.start, chunk.start + chunk.count):
                slot = pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS
                self.slots[slot] = request.token_ids[position]
        for chunk in plan.chunks:
            pages = chunk.request.holding.page_ids  # type: ignore[union-attr]
            context = [
                self.slots[pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS]
                for position in range(chunk.start + chunk.count)
            ]
            out.append(Sampled(next_token(context) if chunk.samples else None))
        return out


def make(
    pages: int, *, running: int = 6, budget: int = 24, chunk: int = 8, prefix_cache: bool = True
) -> Scheduler:
    return Scheduler(
        KVCache(CacheSizes(pages, PAGE_TOKENS), prefix_cache),
        max_running_requests=running,
        max_batch_tokens=budget,
        prefill_chunk_tokens=chunk,
        eos_token_ids=frozenset({EOS}),
    )


def check_plan(scheduler: Scheduler, plan: Plan, budget: int) -> None:
    """Invariants of every plan."""
    assert plan.chunks and plan.tokens <= budget
    assert len({chunk.request.request_id for chunk in plan.chunks}) == len(plan.chunks)
    assert scheduler.running == sorted(scheduler.running, key=lambda request: request.order)
    for chunk in plan.chunks:
        request = chunk.request
        assert request in scheduler.running and request.holding is not None
        assert chunk.start == request.computed_tokens and chunk.count >= 1
        assert len(request.holding.page_ids) * PAGE_TOKENS >= chunk.start + chunk.count
    decoding = {r.request_id for r in scheduler.running if r.missing_tokens == 1}
    planned = {chunk.request.request_id for chunk in plan.chunks}
    assert decoding <= planned, "a decoding request was left out of a step"


def serve(scheduler: Scheduler, runner: FakeRunner | None = None, budget: int = 24) -> dict[int, list[int]]:
    """Runs to the end; the ids each request produced."""
    runner, outputs = runner or FakeRunner(), {}
    while (plan := scheduler.plan()) is not None:
        check_plan(scheduler, plan, budget)
        for delta in scheduler.apply(plan, runner.run(plan)):
            outputs.setdefault(delta.request_id, []).extend(delta.ids)
    return outputs


@pytest.mark.parametrize("pages", [16, 30, 200])
@pytest.mark.parametrize("seed", range(10))
def test_random_traffic(pages: int, seed: int) -> None:
    """Requests come, go and are aborted at random; every one that is not aborted gives exactly its own
    tokens."""
    rng = random.Random(seed)
    scheduler, runner = make(pages), FakeRunner()
    prefixes = [[rng.randrange(50) for _ in range(16)] for _ in range(3)]
    expected: dict[int, list[int]] = {}
    outputs: dict[int, list[int]] = {}
    finished: dict[int, str] = {}
    aborted: set[int] = set()
    next_id = 0
    for tick in range(700):
        if tick < 500 and rng.random() < 0.3:
            prompt = rng.choice(prefixes)[: rng.randrange(17)] + [
                rng.randrange(50) for _ in range(rng.randrange(1, 20))
            ]
            max_tokens = rng.randrange(0, 25)
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
            scheduler.add(Request(next_id, list(prompt), params, priority=rng.choice([0, 0, 1])))
            expected[next_id] = expected_output(prompt, max_tokens)
            next_id += 1
        if rng.random() < 0.05 and next_id:
            victim = rng.randrange(next_id)
            if victim not in finished:
                aborted.add(victim)
            scheduler.abort(victim)
        plan = scheduler.plan()
        if plan is None:
            continue
        check_plan(scheduler, plan, 24)
        results = runner.run(plan)
        if rng.random() < 0.05:  # an abort that arrives while the step is under way
            victim = rng.choice(plan.chunks).request.request_id
            aborted.add(victim)
            scheduler.abort(victim)
        for delta in scheduler.apply(plan, results):
            assert delta.request_id not in finished and delta.request_id not in aborted
            outputs.setdefault(delta.request_id, []).extend(delta.ids)
            if delta.finish_reason:
                finished[delta.request_id] = delta.finish_reason
    for request_id, ids in serve(scheduler, runner).items():
        outputs.setdefault(request_id, []).extend(ids)
    for request_id, ids in expected.items():
        if request_id not in aborted:
            assert outputs.get(request_id, []) == ids, f"request {request_id}"
    assert not scheduler.has_work
    assert scheduler.cache.available_pages == pages, "pages leaked"
    if pages == 16:
        assert scheduler.stats().retractions > 0, "the traffic never ran out of pages: the test is too weak"


@pytest.mark.parametrize("chunk", range(1, 24))
def test_every_chunk_size_computes_the_same(chunk: int) -> None:
    prompt = list(range(23))
    scheduler = make(100, chunk=chunk)
    scheduler.add(Request(0, list(prompt), SamplingParams(max_tokens=9)))
    assert serve(scheduler)[0] == expected_output(prompt, 9)


def test_decode_goes_on_beside_a_long_prompt() -> None:
    scheduler, runner = make(200, chunk=8, budget=10), FakeRunner()
    scheduler.add(Request(0, [1], SamplingParams(max_tokens=50)))
    scheduler.apply(plan := scheduler.plan(), runner.run(plan))  # type: ignore[arg-type]
    scheduler.add(Request(1, [2] * 100, SamplingParams(max_tokens=1)))
    for _ in range(10):
        plan = scheduler.plan()
        assert plan is not None
        assert [chunk.count for chunk in plan.chunks] == [1, 8], "one decode token and one chunk"
        scheduler.apply(plan, runner.run(plan))


def test_the_youngest_is_retracted_and_its_tokens_are_not_lost() -> None:
    scheduler = make(10, running=2)
    for request_id in range(2):
        scheduler.add(Request(request_id, [request_id + 1] * 8, SamplingParams(max_tokens=24)))
    outputs = serve(scheduler)
    assert scheduler.stats().retractions >= 1
    for request_id in range(2):
        assert outputs[request_id] == expected_output([request_id + 1] * 8, 24)


def test_lower_priority_number_first_then_first_come() -> None:
    scheduler = make(100, running=1)
    for request_id, priority in ((0, 1), (1, 0), (2, 1), (3, 0)):
        scheduler.add(Request(request_id, [5], SamplingParams(max_tokens=1), priority=priority))
    assert list(serve(scheduler)) == [1, 3, 0, 2]


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler, runner = make(100), FakeRunner()
    prompt = list(range(40))
    for request_id in range(2):
        scheduler.add(Request(request_id, [*prompt, request_id], SamplingParams(max_tokens=2)))
        serve(scheduler, runner)
    stats = scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (82, 40)


def test_abort_frees_the_pages_at_once() -> None:
    scheduler, runner = make(20, prefix_cache=False), FakeRunner()
    scheduler.add(Request(0, [1] * 30, SamplingParams(max_tokens=5)))
    scheduler.apply(plan := scheduler.plan(), runner.run(plan))  # type: ignore[arg-type]
    assert scheduler.stats().kv_pages_free < 20
    scheduler.abort(0)
    assert scheduler.stats().kv_pages_free == 20 and not scheduler.has_work


def stop_after(params: SamplingParams, tokens: list[int]) -> list[Delta]:
    """Deltas of a request whose sampled tokens are `tokens`."""
    scheduler = make(20)
    scheduler.add(Request(0, [1, 2], params))
    deltas = []
    for token_id in tokens:
        plan = scheduler.plan()
        if plan is None:
            break
        deltas += scheduler.apply(
            plan, [Sampled(token_id if chunk.samples else None) for chunk in plan.chunks]
        )
    return deltas


def test_stops() -> None:
    eos = stop_after(SamplingParams(max_tokens=9), [5, EOS, 6])
    assert [d.finish_reason for d in eos] == [None, "stop"] and eos[-1].stop_token_id == EOS
    ignored = stop_after(SamplingParams(max_tokens=3, ignore_eos=True), [EOS, EOS, EOS])
    assert [d.finish_reason for d in ignored] == [None, None, "length"]
    stop_id = stop_after(SamplingParams(max_tokens=9, stop_token_ids=(7,)), [5, 7])
    assert (stop_id[-1].finish_reason, stop_id[-1].stop_token_id) == ("stop", 7)
    too_early = stop_after(SamplingParams(max_tokens=3, min_tokens=2), [EOS, EOS, 5])
    assert [d.finish_reason for d in too_early] == [None, "stop"]
    nothing = stop_after(SamplingParams(max_tokens=0), [5])
    assert [(d.ids, d.finish_reason) for d in nothing] == [([], "length")]
