"""What the states of recurrent layers have seen, under random traffic: a request's just its computed tokens,
a snapshot's just the tokens that lead to its node. Tokens that were only drafted are in neither; a runner
that lets them in is caught.

No step verifies drafts yet. What one will have to keep to is written here: it may try drafts on a copy of a
state, never on the state of a request, not even if it puts that right before the request's next step.
"""

from __future__ import annotations

import random

import pytest

from firebox.cache.kv_cache import CacheSizes, KVCache
from firebox.cache.radix import Node
from firebox.engine.messages import SamplingParams
from firebox.engine.request import Request
from firebox.engine.scheduler import Plan, Sampled, Scheduler

PAGE_TOKENS = 4
SCRATCH = -1  # a slot that the cache knows nothing of
REJECTED = 998
State = tuple[int, ...]  # the tokens it has seen, in order


def next_token(seen: State) -> int:
    """The fake model: depends on every token before, and is never the draft."""
    value = 17
    for token_id in seen:
        value = (value * 31 + token_id + 7) % 1000003
    return value % 900


def tokens_to(node: Node) -> State:
    """What a state at the end of this node's page has seen."""
    return () if node.parent is None else tokens_to(node.parent) + node.key


def expected_output(prompt: list[int], max_tokens: int) -> list[int]:
    seen = tuple(prompt)
    for _ in range(max_tokens):
        seen += (next_token(seen),)
    return list(seen[len(prompt) :])


class StateRunner:
    """Keeps for every slot what its state has seen. `drafts`: where it tries a token that the model will not
    say, after each one that it says."""

    def __init__(self, scheduler: Scheduler, drafts: str) -> None:
        self.tree = scheduler.cache.tree
        self.drafts = drafts
        self.states: dict[int, State] = {0: ()}
        self.to_restore: dict[int, State] = {}
        self.snapshots = 0

    def run(self, plan: Plan) -> list[Sampled]:
        for source, target in plan.state_copies:
            self.states[target] = self.states[source]
        self.states |= self.to_restore
        self.to_restore.clear()
        self.check_snapshots()
        return [Sampled(self.advance(chunk.request, chunk.start, chunk.count)) for chunk in plan.chunks]

    def check_snapshots(self) -> None:
        for node in self.tree.nodes():
            if node.state_slot:
                assert self.states[node.state_slot] == tokens_to(node), "a snapshot that saw other tokens"
                self.snapshots += 1

    def advance(self, request: Request, start: int, count: int) -> int | None:
        assert request.holding is not None
        slot = request.holding.state_slot
        assert self.states[slot] == tuple(request.token_ids[:start]), "a state that saw other tokens"
        self.states[slot] += tuple(request.token_ids[start : start + count])
        if start + count < len(request.token_ids):
            return None
        chosen = next_token(self.states[slot])
        tried = (*self.states[slot], chosen, REJECTED)
        if self.drafts == "on a copy":
            self.states[SCRATCH] = tried
        elif self.drafts == "on the state":
            self.states[slot] = tried
        elif self.drafts == "on the state, put right later":
            self.to_restore[slot] = self.states[slot]
            self.states[slot] = tried
        return chosen


def serve(drafts: str, seed: int) -> tuple[StateRunner, Scheduler]:
    """Random requests with shared prefixes, in too few pages and slots; each gives its own tokens."""
    rng = random.Random(seed)
    scheduler = Scheduler(
        KVCache(CacheSizes(pages=26, page_tokens=PAGE_TOKENS, states=12)),
        max_running_requests=4,
        max_batch_tokens=24,
        prefill_chunk_tokens=8,
        eos_token_ids=frozenset(),
    )
    runner = StateRunner(scheduler, drafts)
    texts = [[rng.randrange(50) for _ in range(24)] for _ in range(3)]
    outputs: dict[int, list[int]] = {}
    expected = {}
    for number in range(60):
        prompt = rng.choice(texts)[: rng.randrange(25)] + [
            rng.randrange(50) for _ in range(rng.randrange(1, 9))
        ]
        expected[number] = expected_output(prompt, max_tokens := rng.randrange(1, 30))
        scheduler.add(Request(number, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0)))
        for _ in range(rng.randrange(4) if number < 59 else 10_000):
            if (plan := scheduler.plan()) is None:
                break
            for delta in scheduler.apply(plan, runner.run(plan)):
                outputs.setdefault(delta.request_id, []).extend(delta.ids)
    assert outputs == expected
    return runner, scheduler


@pytest.mark.parametrize("drafts", ["none", "on a copy"])
@pytest.mark.parametrize("seed", range(8))
def test_states_have_seen_accepted_tokens_only(drafts: str, seed: int) -> None:
    runner, scheduler = serve(drafts, seed)
    stats = scheduler.stats()
    assert runner.snapshots > 100 and stats.cached_prompt_tokens > 50 and stats.retractions > 0, stats


@pytest.mark.parametrize("drafts", ["on the state", "on the state, put right later"])
def test_a_runner_that_goes_too_far_is_caught(drafts: str) -> None:
    for seed in range(4):
        with pytest.raises(AssertionError, match="that saw other tokens"):
            serve(drafts, seed)
