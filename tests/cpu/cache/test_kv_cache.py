"""The cache (allocators, prefix tree, sharing, windows, states) against a brute-force model under random
traffic.

The model knows nothing of trees: it remembers, for each page, the tokens written to it, and for each state
slot the tokens that the state has seen. After every operation it checks that every page a request holds
contains that request's tokens, that its state has seen exactly its computed tokens, that no page or slot is
owned twice, and that none is lost.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from firebox.cache.kv_cache import CacheSizes, Holding, KVCache

PAGE_TOKENS = 4
KINDS = {
    "full": {},
    "window": {"window_tokens": 6, "window_pages": 14},
    "state": {"states": 9},
    "both": {"window_tokens": 9, "window_pages": 20, "states": 8},
}


@dataclass
class Live:
    """A running request of the model: its prompt's length, its tokens, how many are computed, its pages."""

    prompt_tokens: int
    token_ids: list[int]
    holding: Holding
    computed: int


class Model:
    """Drives a KVCache and checks it. At most 4 requests run at once."""

    def __init__(self, sizes: CacheSizes, seed: int, prefix_cache: bool = True) -> None:
        self.rng = random.Random(seed)
        self.sizes = sizes
        self.cache = KVCache(sizes, prefix_cache)
        self.written: dict[int, list[int | None]] = {}
        self.written_window: dict[int, list[int | None]] = {}
        self.states: dict[int, list[int]] = {0: []}
        self.live: list[Live] = []
        self.hits = 0

    def start(self) -> None:
        # few distinct tokens and lengths, so that prefixes collide all the time
        token_ids = [self.rng.randrange(2) for _ in range(self.rng.randrange(1, 30))]
        most_cached = len(token_ids) - 1
        holding, cached = self.cache.acquire(token_ids, most_cached)
        assert cached <= most_cached and cached % PAGE_TOKENS == 0
        self.hits += cached > 0
        self.live.append(Live(len(token_ids), token_ids, holding, cached))
        self.copy_states()

    def copy_states(self) -> None:
        for source, target in self.cache.state_copies:
            self.states[target] = list(self.states[source])
        self.cache.state_copies.clear()

    def grow(self, request: Live) -> None:
        count = self.rng.randrange(1, 9)
        if self.cache.has_states and self.rng.random() < 0.7:  # what the scheduler does: stop at a page's end
            count = PAGE_TOKENS - request.computed % PAGE_TOKENS
        while len(request.token_ids) < request.computed + count:
            request.token_ids.append(self.rng.randrange(2))
        tokens = request.computed + count
        pages = -(-tokens // PAGE_TOKENS)
        fits = pages - len(request.holding.page_ids) <= self.cache.available_pages
        if self.sizes.window_tokens is not None:
            fits &= pages - len(request.holding.window_page_ids) <= self.cache.available_window_pages
        assert self.cache.grow(request.holding, tokens) == fits, "grow must succeed exactly when it can"
        if not fits:
            return
        self.copy_states()
        for position in range(request.computed, tokens):
            index, row = divmod(position, PAGE_TOKENS)
            token_id = request.token_ids[position]
            self.written.setdefault(request.holding.page_ids[index], [None] * PAGE_TOKENS)[row] = token_id
            if self.sizes.window_tokens is not None:
                page = request.holding.window_page_ids[index]
                assert page, "a token has no window page to go to"
                self.written_window.setdefault(page, [None] * PAGE_TOKENS)[row] = token_id
            if self.cache.has_states:
                self.states[request.holding.state_slot].append(token_id)
        request.computed = tokens
        self.cache.commit(request.holding, request.token_ids, tokens, request.prompt_tokens)

    def end(self, request: Live) -> None:
        self.live.remove(request)
        self.cache.release(request.holding)

    def check(self) -> None:
        tree, nodes = self.cache.tree, list(self.cache.tree.nodes())
        assert len(nodes) == tree.pages
        assert sum(node.locks == 0 for node in nodes) == tree.unlocked_pages
        assert (
            sum(node.window_page_id != 0 and not node.window_locks for node in nodes)
            == tree.idle_window_pages
        )
        assert sum(node.state_slot != 0 for node in nodes) == tree.snapshots
        for node in nodes:
            assert node.parent is tree.root or (node.parent is not None and node.parent.locks >= node.locks)
            assert tuple(self.written[node.page_id]) == node.key
            assert not node.window_page_id or tuple(self.written_window[node.window_page_id]) == node.key
        for request in self.live:
            self.check_content(request)
        self.check_owners(nodes)

    def check_content(self, request: Live) -> None:
        holding = request.holding
        for position in range(request.computed):
            index, row = divmod(position, PAGE_TOKENS)
            assert self.written[holding.page_ids[index]][row] == request.token_ids[position]
            # the next token looks back on window_tokens − 1 others
            if (
                self.sizes.window_tokens is not None
                and position > request.computed - self.sizes.window_tokens
            ):
                page = holding.window_page_ids[index]
                assert page and self.written_window[page][row] == request.token_ids[position]
        if self.cache.has_states and not self.cache.state_copies:
            assert self.states[holding.state_slot] == request.token_ids[: request.computed]

    def check_owners(self, nodes: list) -> None:
        owned = [node.page_id for node in nodes]
        windows = [node.window_page_id for node in nodes if node.window_page_id]
        slots = [node.state_slot for node in nodes if node.state_slot]
        for request in self.live:
            shared = len(request.holding.nodes)
            owned += request.holding.page_ids[shared:]
            windows += [page for page in request.holding.window_page_ids[shared:] if page]
            slots += [request.holding.state_slot] if self.cache.has_states else []
        for ids, allocator in (
            (owned, self.cache.allocator),
            (windows, self.cache.window_allocator),
            (slots, self.cache.state_allocator),
        ):
            assert len(ids) == len(set(ids)), "something has two owners"
            assert len(ids) + allocator.free_pages == allocator.total_pages, "something is lost"

    def run(self, operations: int) -> None:
        for _ in range(operations):
            choice = self.rng.random()
            if choice < 0.2 and len(self.live) < 4:
                self.start()
            elif choice < 0.85 and self.live:
                self.grow(self.rng.choice(self.live))
            elif self.live:
                self.end(self.rng.choice(self.live))
            self.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pages", [9, 40])
@pytest.mark.parametrize("seed", range(10))
def test_random_traffic(kind: str, pages: int, seed: int) -> None:
    model = Model(CacheSizes(pages, PAGE_TOKENS, **KINDS[kind]), seed)
    model.run(500)
    assert model.hits > 0, "the traffic never hit the cache: the test is too weak"
    for request in list(model.live):
        model.end(request)
    model.check()
    assert model.cache.available_pages == pages


def test_without_prefix_cache_nothing_is_kept() -> None:
    model = Model(CacheSizes(20, PAGE_TOKENS), 1, prefix_cache=False)
    model.run(300)
    assert model.hits == 0 and model.cache.tree.pages == 0


def filled(cache: KVCache, token_ids: list[int]) -> Holding:
    """A request that has computed all its tokens."""
    holding, _ = cache.acquire(token_ids, 0)
    assert cache.grow(holding, len(token_ids))
    cache.commit(holding, token_ids, len(token_ids), len(token_ids))
    return holding


def test_least_recently_used_leaf_goes_first() -> None:
    cache = KVCache(CacheSizes(6, PAGE_TOKENS))
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
    cache = KVCache(CacheSizes(10, PAGE_TOKENS))
    first, second = cache.acquire([7] * 8, 7)[0], cache.acquire([7] * 8, 7)[0]
    for holding in (first, second):
        assert cache.grow(holding, 8)
    for holding in (first, second):
        cache.commit(holding, [7] * 8, 8, 8)
    assert first.page_ids == second.page_ids
    assert cache.allocator.free_pages == 8


def test_locked_pages_are_not_evicted() -> None:
    cache = KVCache(CacheSizes(4, PAGE_TOKENS))
    held = filled(cache, [1] * 12)
    other, _ = cache.acquire([2], 0)
    assert cache.grow(other, 4)
    assert not cache.grow(other, 8)
    cache.release(held)
    assert cache.grow(other, 8)


def test_a_prefix_without_its_window_pages_is_found_only_as_far_as_they_reach() -> None:
    sizes = CacheSizes(20, PAGE_TOKENS, window_tokens=5, window_pages=4)
    cache = KVCache(sizes)
    cache.release(filled(cache, [1] * 12))  # leaves window pages on its last two nodes
    assert cache.acquire([*[1] * 12, 0], 12)[1] == 12
    other = KVCache(sizes)
    other.release(filled(other, [1] * 12))
    other.release(filled(other, [2] * 16))  # takes the window pages away, not the full ones
    holding, cached = other.acquire([*[1] * 12, 0], 12)
    assert (cached, other.tree.pages) == (0, 7)
    other.release(holding)


def test_of_generated_tokens_one_snapshot_is_kept_and_of_the_prompt_too() -> None:
    cache = KVCache(CacheSizes(40, PAGE_TOKENS, states=10))
    holding, _ = cache.acquire([1] * 8, 0)
    token_ids = [1] * 8
    for _ in range(24):
        assert cache.grow(holding, len(token_ids))
        cache.commit(holding, token_ids, len(token_ids), prompt_tokens=8)
        token_ids.append(1)
    assert [node.state_slot != 0 for node in holding.nodes] == [False, True, False, False, False, False, True]


def test_without_a_free_slot_the_oldest_snapshot_goes() -> None:
    cache = KVCache(CacheSizes(40, PAGE_TOKENS, states=2))
    first = filled(cache, [1] * 4)
    cache.release(first)
    assert cache.tree.snapshots == 1
    one, _ = cache.acquire([2], 0)
    two, _ = cache.acquire([3], 0)
    assert cache.tree.snapshots == 0 and {one.state_slot, two.state_slot} == {1, 2}
