"""The page allocator: which pages of the pool are free. Pure bookkeeping; the tensors live in `cache.pool`.

page 0          never handed out: padded rows of a step write there
pages 1 … N     free, or owned by one request, or owned by the prefix tree
"""

from __future__ import annotations


class PageAllocator:
    """Hands out page ids 1 … `pages`, last freed first (the page most likely still in a CPU cache)."""

    def __init__(self, pages: int) -> None:
        assert pages >= 1, pages
        self.total_pages = pages
        self._free = list(range(pages, 0, -1))
        self._is_free = bytearray([0] + [1] * pages)

    @property
    def free_pages(self) -> int:
        """How many pages `allocate` could hand out now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` page ids, or None (and no change) when fewer are free."""
        if count > len(self._free):
            return None
        if count == 0:
            return []
        page_ids = self._free[-count:]
        del self._free[-count:]
        for page_id in page_ids:
            self._is_free[page_id] = 0
        return page_ids

    def free(self, page_ids: list[int]) -> None:
        """Takes pages back. Freeing a page that is free, or page 0, is our mistake."""
        for page_id in page_ids:
            assert 1 <= page_id <= self.total_pages and not self._is_free[page_id], (
                f"page {page_id} freed twice"
            )
            self._is_free[page_id] = 1
        self._free.extend(page_ids)
