"""The page allocator against a set, under random traffic."""

from __future__ import annotations

import random

import pytest

from firebox.cache.pages import PageAllocator


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_equals_a_set(seed: int) -> None:
    rng = random.Random(seed)
    allocator, free, owned = PageAllocator(37), set(range(1, 38)), []
    for _ in range(2000):
        if owned and rng.random() < 0.5:
            page_ids = owned.pop(rng.randrange(len(owned)))
            allocator.free(page_ids)
            free |= set(page_ids)
        else:
            count = rng.randrange(0, 12)
            page_ids = allocator.allocate(count)
            if count > len(free):
                assert page_ids is None
                continue
            assert page_ids is not None and len(set(page_ids)) == count and set(page_ids) <= free
            free -= set(page_ids)
            owned.append(page_ids)
        assert allocator.free_pages == len(free)


def test_page_zero_is_never_handed_out() -> None:
    assert sorted(PageAllocator(5).allocate(5) or []) == [1, 2, 3, 4, 5]


def test_freeing_twice_is_caught() -> None:
    allocator = PageAllocator(4)
    page_ids = allocator.allocate(2)
    assert page_ids is not None
    allocator.free(page_ids)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(page_ids[:1])
    with pytest.raises(AssertionError):
        allocator.free([0])
