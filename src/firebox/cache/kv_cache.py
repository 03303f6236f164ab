"""Pages and states for requests: prefix lookup, growth, sharing and eviction in one place, in terms the
scheduler speaks.

A request's pages, in token order, one list per kind ("full", and "window" where the model has windowed
layers):

    [ shared: pages of the prefix tree's nodes | own: written by this request, not full or not yet shared ]
      `nodes`, locked                            freed with the request

Of the window kind only the pages that the window still reaches are held; earlier entries are 0.

A recurrent layer's state has one slot per request, which every computed token changes. When it stands exactly
at the end of a full page, a copy can be put beside that page's node: a snapshot. A request may start only
where it finds everything it needs: the full pages, the window pages that the next token looks back on, and a
snapshot. Snapshots are taken of computed tokens only, and only accepted tokens are ever counted as computed,
so a state that saw a rejected draft can never be found again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from firebox.cache.pages import PageAllocator
from firebox.cache.radix import Node, PrefixTree


@dataclass(eq=False)
class Holding:
    """What one running request holds. `page_ids[i]` keeps its tokens i·page_tokens … (i+1)·page_tokens − 1,
    `window_page_ids[i]` likewise. `nodes`: the tree's nodes for its first pages. `first_window_page`: the
    window reaches no page before it. `own_snapshot`: the node whose snapshot this request took while it
    generated, to be replaced by the next one. `foreseen_slot`: where a copy goes for a node to come."""

    page_ids: list[int] = field(default_factory=list)
    window_page_ids: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    first_window_page: int = 0
    state_slot: int = 0
    own_snapshot: Node | None = None
    foreseen_slot: int = 0


@dataclass(frozen=True)
class CacheSizes:
    """How many pages and slots there are. `window_tokens` None: the model has no windowed layers. `states` 0:
    no recurrent ones."""

    pages: int
    page_tokens: int
    window_tokens: int | None = None
    window_pages: int = 0
    states: int = 0


class KVCache:
    """The allocators and the prefix tree together. With `prefix_cache` False nothing is ever shared or kept.

    `state_copies`: copies (source slot, target slot) that the runner must make, in order, before the next
    step; it empties the list.
    """

    def __init__(self, sizes: CacheSizes, prefix_cache: bool = True) -> None:
        self.sizes = sizes
        self.page_tokens = sizes.page_tokens
        self.window_tokens = sizes.window_tokens
        self.has_states = sizes.states > 0
        self.allocator = PageAllocator(sizes.pages)
        self.window_allocator = PageAllocator(max(sizes.window_pages, 1))
        self.state_allocator = PageAllocator(max(sizes.states, 1))
        self.tree = PrefixTree(sizes.page_tokens)
        self.state_copies: list[tuple[int, int]] = []
        self._prefix_cache = prefix_cache

    @property
    def available_pages(self) -> int:
        """Full pages that `grow` could take: the free ones and those that eviction would free."""
        return self.allocator.free_pages + self.tree.unlocked_pages

    @property
    def available_window_pages(self) -> int:
        """Window pages that `grow` could take."""
        return self.window_allocator.free_pages + self.tree.idle_window_pages

    @property
    def available_states(self) -> int:
        """State slots that `acquire` could take: every snapshot can be given up."""
        return self.state_allocator.free_pages + self.tree.snapshots

    def window_pages_for(self, first_token: int, last_token: int) -> int:
        """Window pages that computing tokens `first_token` … `last_token` needs; 0 without windowed
        layers."""
        if self.window_tokens is None:
            return 0
        return last_token // self.page_tokens - self._first_window_page(first_token) + 1

    def acquire(self, token_ids: list[int], max_cached_tokens: int) -> tuple[Holding, int]:
        """A new request's holding, and how many of its first tokens (≤ `max_cached_tokens`) are already
        computed. The caller has made sure of `available_states`."""
        path = self._usable(self.tree.match(token_ids, max_cached_tokens)) if self._prefix_cache else []
        cached_tokens = len(path) * self.page_tokens
        holding = Holding([node.page_id for node in path], nodes=path)
        if path:
            self.tree.lock(path[-1])
        if self.window_tokens is not None:
            holding.first_window_page = self._first_window_page(cached_tokens)
            holding.window_page_ids = [0] * holding.first_window_page
            for node in path[holding.first_window_page :]:
                self.tree.lock_window(node)
                holding.window_page_ids.append(node.window_page_id)
        if self.has_states:
            # the source is read before any later copy or step can overwrite it: copies are made in order
            source = path[-1].state_slot if path else 0
            holding.state_slot = self._take_state_slot()
            self.state_copies.append((source, holding.state_slot))
        return holding, cached_tokens

    def assume(self, computed_tokens: int) -> Holding | None:
        """For measuring: pages and a state for a request whose first tokens count as computed, whatever the
        pages hold. None (and no change) when pages run out."""
        holding, _ = self.acquire([], 0)
        if self.window_tokens is not None:
            holding.first_window_page = self._first_window_page(computed_tokens)
            holding.window_page_ids = [0] * holding.first_window_page
        if self.grow(holding, computed_tokens):
            return holding
        self.release(holding)
        return None

    def grow(self, holding: Holding, tokens: int) -> bool:
        """Makes room for `tokens` tokens in all, evicting if need be. False (and no change) when pages of a
        kind run out."""
        pages = -(-tokens // self.page_tokens)
        missing = pages - len(holding.page_ids)
        missing_window = pages - len(holding.window_page_ids) if self.window_tokens is not None else 0
        if missing > self.available_pages or missing_window > self.available_window_pages:
            return False
        if missing > 0:
            self._evict_nodes(missing - self.allocator.free_pages)
            holding.page_ids += self._allocated(self.allocator, missing)
        if missing_window > 0:
            shortage = missing_window - self.window_allocator.free_pages
            if shortage > 0:
                self.window_allocator.free(self.tree.evict_window_pages(shortage))
            holding.window_page_ids += self._allocated(self.window_allocator, missing_window)
        return True

    def commit(
        self, holding: Holding, token_ids: list[int], computed_tokens: int, prompt_tokens: int
    ) -> None:
        """After a step: shares the pages that `computed_tokens` fill, takes a snapshot if they end at a
        page's end, and lets go of what the window has left behind. Where the tree has a page with the same
        tokens, that one is used from now on and the request's own copy is freed."""
        if self._prefix_cache:
            while (len(holding.nodes) + 1) * self.page_tokens <= computed_tokens:
                self._share_page(holding, token_ids)
            if self.has_states and computed_tokens == len(holding.nodes) * self.page_tokens:
                self._snapshot(holding, generated=computed_tokens > prompt_tokens)
        if self.window_tokens is not None:
            self._slide_window(holding, self._first_window_page(computed_tokens))

    def foresee(self, holding: Holding, computed_tokens: int, prompt_tokens: int) -> None:
        """Asks for the copy that `commit` will want of the state after a step, which brings the request to
        `computed_tokens`: the next step is launched before that."""
        if self._prefix_cache and self.has_states and computed_tokens % self.page_tokens == 0:
            holding.foreseen_slot = self._snapshot_slot(holding, generated=computed_tokens > prompt_tokens)
            if holding.foreseen_slot:
                self.state_copies.append((holding.state_slot, holding.foreseen_slot))

    def release(self, holding: Holding) -> None:
        """The request is over or retracted: what it shares stays in the tree, unlocked; its own is freed."""
        shared = len(holding.nodes)
        self.allocator.free(holding.page_ids[shared:])
        if self.window_tokens is not None:
            self._slide_window(holding, len(holding.window_page_ids))
        self.state_allocator.free([slot for slot in (holding.state_slot, holding.foreseen_slot) if slot])
        if shared:
            self.tree.unlock(holding.nodes[-1])
        holding.page_ids, holding.window_page_ids, holding.nodes = [], [], []
        holding.state_slot, holding.own_snapshot, holding.foreseen_slot = 0, None, 0

    def distrust(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Forgets the snapshots that these copies (source slot, target slot) were to make: the step that
        should have made them failed."""
        slots = {target for _, target in copies}
        for node in list(self.tree.nodes()) if slots else ():
            if node.state_slot in slots:
                self.state_allocator.free([self.tree.take_snapshot(node)])

    def _first_window_page(self, token: int) -> int:
        """The first page that the window of the token at position `token` reaches."""
        assert self.window_tokens is not None
        return max(0, token - self.window_tokens + 1) // self.page_tokens

    def _usable(self, path: list[Node]) -> list[Node]:
        """The longest beginning of `path` at whose end a request can start."""
        for length in range(len(path), 0, -1):
            if self.has_states and not path[length - 1].state_slot:
                continue
            if self.window_tokens is not None:
                first = self._first_window_page(length * self.page_tokens)
                if not all(node.window_page_id for node in path[first:length]):
                    continue
            return path[:length]
        return []

    def _share_page(self, holding: Holding, token_ids: list[int]) -> None:
        index = len(holding.nodes)
        start = index * self.page_tokens
        parent = holding.nodes[-1] if holding.nodes else self.tree.root
        own_page_id = holding.page_ids[index]
        node = self.tree.insert(parent, tuple(token_ids[start : start + self.page_tokens]), own_page_id)
        if node.page_id != own_page_id:
            holding.page_ids[index] = node.page_id
            self.allocator.free([own_page_id])
        self.tree.step_down(node)
        holding.nodes.append(node)
        if self.window_tokens is not None and (own := holding.window_page_ids[index]):
            if node.window_page_id:
                self.window_allocator.free([own])
                holding.window_page_ids[index] = node.window_page_id
            else:
                self.tree.give_window_page(node, own)
            self.tree.lock_window(node)

    def _snapshot(self, holding: Holding, *, generated: bool) -> None:
        """A copy of the state to the node it stands at. Of a request's generated tokens only the latest
        snapshot is kept."""
        slot, holding.foreseen_slot = holding.foreseen_slot, 0
        if not holding.nodes or holding.nodes[-1].state_slot:
            self.state_allocator.free([slot] if slot else [])
            return
        if not slot:
            slot = self._snapshot_slot(holding, generated=generated)
            if not slot:
                return
            self.state_copies.append((holding.state_slot, slot))
        self.tree.give_snapshot(holding.nodes[-1], slot)
        holding.own_snapshot = holding.nodes[-1] if generated else None

    def _snapshot_slot(self, holding: Holding, *, generated: bool) -> int:
        """For a snapshot; 0 where none is to be had."""
        if generated and holding.own_snapshot is not None and holding.own_snapshot.state_slot:
            return self.tree.take_snapshot(holding.own_snapshot)
        return self._take_state_slot() if self.available_states else 0

    def _slide_window(self, holding: Holding, first_page: int) -> None:
        for index in range(holding.first_window_page, min(first_page, len(holding.window_page_ids))):
            if index < len(holding.nodes):
                self.tree.unlock_window(holding.nodes[index])
            else:
                self.window_allocator.free([holding.window_page_ids[index]])
            holding.window_page_ids[index] = 0
        holding.first_window_page = max(holding.first_window_page, first_page)

    def _take_state_slot(self) -> int:
        if not self.state_allocator.free_pages:
            return self.tree.oldest_snapshot()
        (slot,) = self._allocated(self.state_allocator, 1)
        return slot

    def _evict_nodes(self, count: int) -> None:
        for node in self.tree.evict(max(count, 0)):
            self.allocator.free([node.page_id])
            if node.window_page_id:
                self.window_allocator.free([node.window_page_id])
            if node.state_slot:
                self.state_allocator.free([node.state_slot])

    @staticmethod
    def _allocated(allocator: PageAllocator, count: int) -> list[int]:
        page_ids = allocator.allocate(count)
        assert page_ids is not None, (count, allocator.free_pages)
        return page_ids
