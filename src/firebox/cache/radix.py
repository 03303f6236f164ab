"""The prefix tree: pages of finished and running requests, found again by the tokens they hold.

A radix tree whose edges are exactly one page of tokens long, so a node is a page and nothing is ever split:

    root ── (tokens 0 … 15) ── (tokens 16 … 31) ── …
              page 7              page 3

A node is locked while a running request stands on it or below it; unlocked nodes are evicted, leaves first,
least recently used first. Idea: SGLang's RadixAttention (Zheng et al., 2024, arXiv:2312.07104) and vLLM's
per-page hashes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator


class Node:
    """One cached page. `locks` counts the requests that stand on it or below it."""

    __slots__ = ("children", "key", "last_used", "locks", "page_id", "parent")

    def __init__(self, key: tuple[int, ...], page_id: int, parent: Node | None) -> None:
        self.key = key
        self.page_id = page_id
        self.parent = parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.locks = 0
        self.last_used = 0


class PrefixTree:
    """Maps token prefixes to page ids. It owns the pages of its nodes until `evict` gives them back."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.root = Node((), 0, None)
        self.pages = 0
        self.unlocked_pages = 0
        self._clock = 0
        self._notes = 0
        self._leaves: list[
            tuple[int, int, Node]
        ] = []  # heap of (last_used, note number, node); stale notes are skipped

    def match(self, token_ids: list[int], max_tokens: int) -> list[Node]:
        """The longest path whose pages hold a prefix of `token_ids` of at most `max_tokens` tokens, root
        excluded."""
        path: list[Node] = []
        node = self.root
        for start in range(0, max_tokens - self.page_tokens + 1, self.page_tokens):
            child = node.children.get(tuple(token_ids[start : start + self.page_tokens]))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def insert(self, parent: Node, key: tuple[int, ...], page_id: int) -> Node:
        """The child of `parent` that holds `key`; a new one owning `page_id` unless it is there already."""
        assert len(key) == self.page_tokens, (len(key), self.page_tokens)
        child = parent.children.get(key)
        if child is None:
            child = parent.children[key] = Node(key, page_id, parent)
            self.pages += 1
            self.unlocked_pages += 1
            self._touch(child)
        return child

    def lock(self, node: Node) -> None:
        """One more request stands on `node`: it and its ancestors cannot be evicted."""
        while node.parent is not None:
            if node.locks == 0:
                self.unlocked_pages -= 1
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        """Undoes one `lock` of this node, and marks its path as just used."""
        self._clock += 1
        while node.parent is not None:
            assert node.locks > 0, f"page {node.page_id} unlocked more often than locked"
            node.locks -= 1
            if node.locks == 0:
                self.unlocked_pages += 1
            self._touch(node)
            node = node.parent

    def step_down(self, child: Node) -> None:
        """Moves one request's lock from `child.parent` to `child`: the ancestors keep the one they have."""
        if child.locks == 0:
            self.unlocked_pages -= 1
        child.locks += 1

    def evict(self, count: int) -> list[int]:
        """Removes up to `count` unlocked pages, least recently used leaves first, and gives their ids
        back."""
        page_ids: list[int] = []
        while len(page_ids) < count and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            parent = node.parent
            if parent is None or node.last_used != last_used or not self._evictable(node):
                continue  # stale: gone, used again, locked or grown since it was noted
            del parent.children[node.key]
            node.parent = None
            self.pages -= 1
            self.unlocked_pages -= 1
            page_ids.append(node.page_id)
            self._note_leaf(parent)
        return page_ids

    def nodes(self) -> Iterator[Node]:
        """Every node but the root, parents before children."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def _touch(self, node: Node) -> None:
        node.last_used = self._clock
        self._note_leaf(node)

    def _note_leaf(self, node: Node) -> None:
        if node.parent is None or not self._evictable(node):
            return
        self._notes += 1
        heapq.heappush(self._leaves, (node.last_used, self._notes, node))
        if len(self._leaves) > 64 + 4 * self.pages:  # mostly stale by now
            leaves = filter(self._evictable, self.nodes())
            self._leaves = [(leaf.last_used, i, leaf) for i, leaf in enumerate(leaves, self._notes)]
            self._notes += len(self._leaves)
            heapq.heapify(self._leaves)

    @staticmethod
    def _evictable(node: Node) -> bool:
        return not node.children and not node.locks
