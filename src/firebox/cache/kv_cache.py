"""Pages for requests: prefix lookup, growth, sharing and eviction in one place, in terms the scheduler
speaks.

A request's pages, in token order:

    [ shared: locked nodes of the prefix tree | own: written by this request, not yet full or not yet shared ]
      `shared_pages` of them                    freed with the request
"""

from __future__ import annotations

from dataclasses import dataclass, field

from firebox.cache.pages import PageAllocator
from firebox.cache.radix import Node, PrefixTree


@dataclass(eq=False)
class Holding:
    """The pages one running request holds. `page_ids[i]` keeps its tokens i·page_tokens … (i+1)·page_tokens −
    1."""

    node: Node
    page_ids: list[int] = field(default_factory=list)
    shared_pages: int = 0


class KVCache:
    """The allocator and the prefix tree together. With `prefix_cache` False nothing is ever shared or
    kept."""

    def __init__(self, pages: int, page_tokens: int, prefix_cache: bool = True) -> None:
        self.page_tokens = page_tokens
        self.allocator = PageAllocator(pages)
        self.tree = PrefixTree(page_tokens)
        self._prefix_cache = prefix_cache

    @property
    def available_pages(self) -> int:
        """Pages that `grow` could take: the free ones and those that eviction would free."""
        return self.allocator.free_pages + self.tree.unlocked_pages

    def acquire(self, token_ids: list[int], max_cached_tokens: int) -> tuple[Holding, int]:
        """A new request's holding, and how many of its first tokens (≤ `max_cached_tokens`) are already
        computed."""
        path = self.tree.match(token_ids, max_cached_tokens) if self._prefix_cache else []
        holding = Holding(path[-1] if path else self.tree.root, [node.page_id for node in path], len(path))
        self.tree.lock(holding.node)
        return holding, len(path) * self.page_tokens

    def grow(self, holding: Holding, tokens: int) -> bool:
        """Makes room for `tokens` tokens in all, evicting if need be. False (and no change) when pages run
        out."""
        missing = -(-tokens // self.page_tokens) - len(holding.page_ids)
        if missing <= 0:
            return True
        shortage = missing - self.allocator.free_pages
        if shortage > 0:
            if shortage > self.tree.unlocked_pages:
                return False
            self.allocator.free(self.tree.evict(shortage))
        page_ids = self.allocator.allocate(missing)
        assert page_ids is not None, (missing, self.allocator.free_pages)
        holding.page_ids += page_ids
        return True

    def commit(self, holding: Holding, token_ids: list[int], computed_tokens: int) -> None:
        """Shares the pages that `computed_tokens` fill. Where the tree has a page with the same tokens, that
        one is used from now on and the request's own copy is freed."""
        if not self._prefix_cache:
            return
        while (holding.shared_pages + 1) * self.page_tokens <= computed_tokens:
            index = holding.shared_pages
            start = index * self.page_tokens
            own_page_id = holding.page_ids[index]
            child = self.tree.insert(
                holding.node, tuple(token_ids[start : start + self.page_tokens]), own_page_id
            )
            if child.page_id != own_page_id:
                holding.page_ids[index] = child.page_id
                self.allocator.free([own_page_id])
            self.tree.step_down(child)
            holding.node = child
            holding.shared_pages += 1

    def release(self, holding: Holding) -> None:
        """The request is over or retracted: its shared pages stay in the tree, unlocked; its own are
        freed."""
        self.allocator.free(holding.page_ids[holding.shared_pages :])
        self.tree.unlock(holding.node)
        holding.page_ids = []
        holding.shared_pages = 0
        holding.node = self.tree.root
