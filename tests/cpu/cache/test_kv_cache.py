"""The cache (allocator, prefix tree, sharing) against a brute-force model under random traffic.

The model knows nothing of trees: it remembers, for each page, the tokens written to it, and checks after
every operation that every page a request holds contains that request's tokens, that no page is owned twice,
and that none is lost.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from firebox.cache.kv_cache import Holding, KVCache

PAGE_TOKENS = 4


@dataclass
class Live:
    """A running request of the model: its tokens, how many are computed, its pages."""

    token_ids: list[int]
    holding: Holding
    computed: int


class Model:
    """Drives a KVCache and checks it."""

    def __init__(self, pages: int, seed: int, prefix_cache: bool = True) -> None:
        self.rng = random.Random(seed)
        self.cache = KVCache(pages, PAGE_TOKENS, prefix_cache)
        self.written: dict[int, list[int | None]] = {}
        self.live: list[Live] = []
        self.hits = 0

    def start(self) -> None:
        # few distinct tokens and lengths, so that prefixes collide all the time
        token_ids = [self.rng.randrange(2) for _ in range(self.rng.randrange(1, 30))]
        most_cached = len(token_ids) - 1
        holding, cached = self.cache.acquire(token_ids, most_cached)
        assert cached <= most_cached and cached % PAGE_TOKENS == 0
        self.hits += cached > 0
        self.live.append(Live(token_ids, holding, cached))

    def grow(self, request: Live) -> None:
        count = self.rng.randrange(1, 9)
        while len(request.token_ids) < request.computed + count:
            request.token_ids.append(self.rng.randrange(2))
        tokens = request.computed + count
        available, missing = (
            self.cache.available_pages,
            -(-tokens // PAGE_TOKENS) - len(request.holding.page_ids),
        )
        grown = self.cache.grow(request.holding, tokens)
        assert grown == (missing <= available), "grow must succeed exactly when evicting could make room"
        if not grown:
            return
        for position in range(request.computed, tokens):
            page = request.holding.page_ids[position // PAGE_TOKENS]
            row = self.written.setdefault(page, [None] * PAGE_TOKENS)
            row[position % PAGE_TOKENS] = request.token_ids[position]
        request.computed = tokens
        self.cache.commit(request.holding, request.token_ids, request.computed)

    def end(self, request: Live) -> None:
        self.live.remove(request)
        self.cache.release(request.holding)

    def check(self) -> None:
        tree, allocator = self.cache.tree, self.cache.allocator
        nodes = list(tree.nodes())
        assert len(nodes) == tree.pages
        assert sum(node.locks == 0 for node in nodes) == tree.unlocked_pages
        owned = [node.page_id for node in nodes]
        for request in self.live:
            owned += request.holding.page_ids[request.holding.shared_pages :]
            for position in range(request.computed):
                page = request.holding.page_ids[position // PAGE_TOKENS]
                assert self.written[page][position % PAGE_TOKENS] == request.token_ids[position]
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert len(owned) + allocator.free_pages == allocator.total_pages, "a page is lost"
        for node in nodes:
            assert node.parent is tree.root or (node.parent is not None and node.parent.locks >= node.locks)
            assert tuple(self.written[node.page_id]) == node.key

    def run(self, operations: int) -> None:
        for _ in range(operations):
            choice = self.rng.random()
            if choice < 0.2 and len(self.live) < 6:
                self.start()
            elif choice < 0.85 and self.live:
                self.grow(self.rng.choice(self.live))
            elif self.live:
                self.end(self.rng.choice(self.live))
            self.check()


@pytest.mark.parametrize("pages", [3, 11, 40])
@pytest.mark.parametrize("seed", range(8))
def test_random_traffic(pages: int, seed: int) -> None:
    model = Model(pages, seed)
    model.run(400)
    assert model.hits > 0, "the traffic never hit the cache: the test is too weak"
    for request in list(model.live):
        model.end(request)
    assert model.cache.available_pages == pages


def test_without_prefix_cache_nothing_is_kept() -> None:
    model = Model(20, 1, prefix_cache=False)
    model.run(300)
    assert model.hits == 0 and model.cache.tree.pages == 0


def filled(cache: KVCache, token_ids: list[int]) -> Holding:
    """A request that has computed all its tokens."""
    holding, _ = cache.acquire(token_ids, 0)
    assert cache.grow(holding, len(token_ids))
    cache.commit(holding, token_ids, len(token_ids))
    return holding


def test_least_recently_used_leaf_goes_first() -> None:
    cache = KVCache(6, PAGE_TOKENS)
    old, new = [1] * 8, [2] * 8
    cache.release(filled(cache, old))
    cache.release(filled(cache, new))
    holding, cached = cache.acquire([*old, 0], 8)  # touches the older one
    assert cached == 8
    cache.release(holding)
    big = filled(cache, [3] * 16)  # needs 4 pages: 2 free, 2 evicted
    assert cache.acquire([*old, 0], 8)[1] == 8, "the recently used one was evicted"
    assert cache.acquire([*new, 0], 8)[1] == 0
    cache.release(big)


def test_two_requests_with_the_same_prompt_end_up_on_the_same_pages() -> None:
    cache = KVCache(10, PAGE_TOKENS)
    first, second = cache.acquire([7] * 8, 7)[0], cache.acquire([7] * 8, 7)[0]
    for holding in (first, second):
        assert cache.grow(holding, 8)
    for holding in (first, second):
        cache.commit(holding, [7] * 8, 8)
    assert first.page_ids == second.page_ids
    assert cache.allocator.free_pages == 8


def test_locked_pages_are_not_evicted() -> None:
    cache = KVCache(4, PAGE_TOKENS)
    held = filled(cache, [1] * 12)
    other, _ = cache.acquire([2], 0)
    assert cache.grow(other, 4)
    assert not cache.grow(other, 8)
    cache.release(held)
    assert cache.grow(other, 8)
