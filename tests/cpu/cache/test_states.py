"""The states of recurrent layers: slots of all layers of a shape are copied together."""

from __future__ import annotations

import pytest
import torch

from firebox.cache.pool import PoolSizes, StateCache, allocate_pool
from firebox.cache.specs import PagedSpec, RecurrentSpec
from firebox.find import load

SMALL, LARGE = RecurrentSpec(6, 3, 2, 4, 5), RecurrentSpec(8, 3, 2, 4, 5)
SLOTS = 4


def filled(*specs: PagedSpec | RecurrentSpec) -> list[StateCache]:
    """Every layer and slot with numbers of its own, but for slot 0."""
    stores = allocate_pool(
        specs, PoolSizes(2, 16, states=SLOTS), load("formats.kv", "float32"), torch.device("cpu")
    )
    found = [store for store in stores if isinstance(store, StateCache)]
    for layer, cache in enumerate(found):
        for slot in range(1, SLOTS + 1):
            cache.conv[slot] = 10 * layer + slot
            cache.matrix[slot] = -(10 * layer + slot)
    return found


def seen(cache: StateCache) -> list[float]:
    """What each slot holds, which is one number."""
    pairs = zip(cache.conv.flatten(1), cache.matrix.flatten(1), strict=True)
    for conv, matrix in pairs:
        assert conv.unique().numel() == 1 and (matrix == -conv[0]).all()
    return cache.conv[:, 0, 0].tolist()


def test_a_copy_is_of_every_layer_and_of_one_slot() -> None:
    layers = filled(SMALL, PagedSpec(2, 8), SMALL, SMALL)
    assert len({id(cache.stack) for cache in layers}) == 1
    layers[0].stack.copy(2, 4)
    layers[0].stack.copy(0, 1)
    assert [seen(cache) for cache in layers] == [[0, 0, 2, 3, 2], [0, 0, 12, 13, 12], [0, 0, 22, 23, 22]]
    layers[1].clear(3)
    assert [seen(cache)[3] for cache in layers] == [3, 0, 23]


def test_layers_of_other_shapes_are_copied_apart() -> None:
    one, other, again = filled(SMALL, LARGE, SMALL)
    assert one.stack is again.stack is not other.stack
    one.stack.copy(1, 2)
    assert [seen(cache) for cache in (one, other, again)] == [
        [0, 1, 1, 3, 4],
        [0, 11, 12, 13, 14],
        [0, 21, 21, 23, 24],
    ]


@pytest.mark.parametrize("name", ["conv", "matrix"])
def test_a_layer_s_states_lie_as_kernels_read_them(name: str) -> None:
    layers = filled(SMALL, SMALL)
    for cache in layers:
        assert getattr(cache, name).is_contiguous() and getattr(cache, name).shape[0] == SLOTS + 1
    one, other = (getattr(cache, name) for cache in layers)
    assert one.data_ptr() + one.nbytes == other.data_ptr(), "made once, side by side"
