"""The prefix tree: pages of finished and running requests, found again by the tokens they hold.

A radix tree whose edges are exactly one page of tokens long, so a node is a page and nothing is ever split:

    root ── (tokens 0 … 15) ── (tokens 16 … 31) ── …
              page 7              page 3

A node owns a page of the full kind and, where the model has such layers, perhaps a page of the window kind
and perhaps a snapshot of the recurrent state after its last token. It is locked while a running request
stands on it or below it; unlocked nodes are evicted, leaves first, least recently used first. Window pages
and snapshots can be given up earlier: the node stays, and a request that would need them starts higher up.
Idea: SGLang's RadixAttention (Zheng et al., 2024, arXiv:2312.07104) and vLLM's per-page hashes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator


class Node:
    """One cached page. `locks` counts the requests that stand on it or below it; `window_locks` those that
    still read its window page. `window_page_id` and `state_slot` are 0 where there is none."""

    __slots__ = (
        "children",
        "key",
        "last_used",
        "locks",
        "page_id",
        "parent",
        "state_slot",
        "window_locks",
        "window_page_id",
    )

    def __init__(self, key: tuple[int, ...], page_id: int, parent: Node | None) -> None:
        self.key = key
        self.page_id = page_id
        self.parent = parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.locks = 0
        self.last_used = 0
        self.window_page_id = 0
        self.window_locks = 0
        self.state_slot = 0


class _Oldest:
    """Nodes by last use, oldest first. A note goes stale when its node is used again; `is_candidate` says
    which ones still count."""

    def __init__(self, is_candidate: Callable[[Node], bool]) -> None:
        self._is_candidate = is_candidate
        self._heap: list[tuple[int, int, Node]] = []
        self._notes = 0

    def note(self, node: Node, nodes: Callable[[], Iterator[Node]], size: int) -> None:
        """Remembers `node` if it is a candidate. Rebuilt from `nodes` when most notes must be stale."""
        if not self._is_candidate(node):
            return
        self._notes += 1
        heapq.heappush(self._heap, (node.last_used, self._notes, node))
        if len(self._heap) > 64 + 4 * size:
            candidates = filter(self._is_candidate, nodes())
            self._heap = [(n.last_used, i, n) for i, n in enumerate(candidates, self._notes)]
            self._notes += len(self._heap)
            heapq.heapify(self._heap)

    def pop(self) -> Node | None:
        """The candidate that was used longest ago, or None."""
        while self._heap:
            last_used, _, node = heapq.heappop(self._heap)
            if node.last_used == last_used and self._is_candidate(node):
                return node
        return None


def _is_unlocked_leaf(node: Node) -> bool:
    return node.parent is not None and not node.children and not node.locks


def _has_idle_window_page(node: Node) -> bool:
    return node.parent is not None and node.window_page_id != 0 and not node.window_locks


def _has_snapshot(node: Node) -> bool:
    return node.parent is not None and node.state_slot != 0


class PrefixTree:
    """Maps token prefixes to nodes. It owns what its nodes own until an eviction gives it back."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.root = Node((), 0, None)
        self.pages = 0
        self.unlocked_pages = 0
        self.idle_window_pages = 0
        self.snapshots = 0
        self._clock = 0
        self._leaves = _Oldest(_is_unlocked_leaf)
        self._windows = _Oldest(_has_idle_window_page)
        self._states = _Oldest(_has_snapshot)

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

    def evict(self, count: int) -> list[Node]:
        """Removes up to `count` unlocked nodes, least recently used leaves first; the caller takes over what
        they own."""
        removed: list[Node] = []
        while len(removed) < count and (node := self._leaves.pop()) is not None:
            parent = node.parent
            assert parent is not None and not node.window_locks, node.page_id
            del parent.children[node.key]
            node.parent = None
            self.pages -= 1
            self.unlocked_pages -= 1
            self.idle_window_pages -= node.window_page_id != 0
            self.snapshots -= node.state_slot != 0
            removed.append(node)
            self._leaves.note(parent, self.nodes, self.pages)
        return removed

    def give_window_page(self, node: Node, page_id: int) -> None:
        """`node` owns a window page from now on; nobody reads it yet."""
        assert node.window_page_id == 0 and node.window_locks == 0
        node.window_page_id = page_id
        self.idle_window_pages += 1

    def lock_window(self, node: Node) -> None:
        """One more request reads the node's window page."""
        assert node.window_page_id != 0
        self.idle_window_pages -= node.window_locks == 0
        node.window_locks += 1

    def unlock_window(self, node: Node) -> None:
        """Undoes one `lock_window`."""
        assert node.window_locks > 0
        node.window_locks -= 1
        self.idle_window_pages += node.window_locks == 0
        self._windows.note(node, self.nodes, self.pages)

    def evict_window_pages(self, count: int) -> list[int]:
        """Takes up to `count` idle window pages from their nodes, least recently used first; the nodes
        stay."""
        page_ids: list[int] = []
        while len(page_ids) < count and (node := self._windows.pop()) is not None:
            page_ids.append(node.window_page_id)
            node.window_page_id = 0
            self.idle_window_pages -= 1
        return page_ids

    def give_snapshot(self, node: Node, state_slot: int) -> None:
        """`node` owns a snapshot of the state after its last token."""
        assert node.state_slot == 0
        node.state_slot = state_slot
        self.snapshots += 1
        self._states.note(node, self.nodes, self.pages)

    def take_snapshot(self, node: Node) -> int:
        """Takes a node's snapshot away; its slot."""
        slot, node.state_slot = node.state_slot, 0
        assert slot != 0
        self.snapshots -= 1
        return slot

    def oldest_snapshot(self) -> int:
        """The slot of the least recently used snapshot, taken from its node; 0 when there is none."""
        node = self._states.pop()
        return 0 if node is None else self.take_snapshot(node)

    def nodes(self) -> Iterator[Node]:
        """Every node but the root, parents before children."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def _touch(self, node: Node) -> None:
        node.last_used = self._clock
        for oldest in (self._leaves, self._windows, self._states):
            oldest.note(node, self.nodes, self.pages)
