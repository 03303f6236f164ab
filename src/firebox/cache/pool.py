"""The tensors behind page ids and state slots: for each layer what its spec asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from firebox.cache.specs import CacheSpec, LatentSpec, PagedSpec, RecurrentSpec, WindowSpec
from firebox.formats.kv.base import NO_SCALES, KvFormat


@dataclass(frozen=True)
class LayerCache:
    """`k` and `v` [pages + 1, page_tokens, kv_heads, head_dim]; slot s is page s // page_tokens, row s %
    page_tokens. For a latent layer `v` is a view of `k`'s first `latent_dim` columns. Both are stored in
    `format`, with `scales` of keys and values."""

    k: torch.Tensor
    v: torch.Tensor
    format: KvFormat
    scales: tuple[float, float] = NO_SCALES

    def write(self, token_slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
        """Stores `k` and, unless it is a view of it, `v` [tokens, kv_heads, head_dim] at `token_slots`
        [tokens] int64."""
        _put(self.k, token_slots, self.format.encode(k, self.scales[0]))
        if v is not None:
            _put(self.v, token_slots, self.format.encode(v, self.scales[1]))

    def read(self, page_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [rows, kv_heads, head_dim] and values [rows, kv_heads, value_dim] of these pages [n] int64,
        page after page, in float32."""
        k, v = (cache[page_ids].flatten(0, 1) for cache in (self.k, self.v))
        return self.format.decode(k, self.scales[0]), self.format.decode(v, self.scales[1])


def _put(cache: torch.Tensor, token_slots: torch.Tensor, rows: torch.Tensor) -> None:
    stored = cache.flatten(0, 1)
    if stored.itemsize == 1:  # torch has no index_copy_ for float8; bytes are bytes
        stored, rows = stored.view(torch.uint8), rows.view(torch.uint8)
    stored.index_copy_(0, token_slots, rows)


@dataclass(frozen=True)
class StateStack:
    """States of all recurrent layers of one shape, side by side, so that a slot is copied in two launches
    however many layers there are. `conv` [layers, slots, channels, taps] and `matrix` [layers, slots, heads,
    key_dim, value_dim], float32."""

    conv: torch.Tensor
    matrix: torch.Tensor

    def copy(self, source: int, target: int) -> None:
        """Every layer's state in slot `source` to slot `target`."""
        self.conv[:, target].copy_(self.conv[:, source])
        self.matrix[:, target].copy_(self.matrix[:, source])


@dataclass(frozen=True)
class StateCache:
    """A recurrent layer's states by slot, views of its stack's: `conv` [slots, channels, taps] and `matrix`
    [slots, heads, key_dim, value_dim]. Slot 0 is always zero: the state before the first token."""

    conv: torch.Tensor
    matrix: torch.Tensor
    stack: StateStack

    def clear(self, slot: int) -> None:
        """Back to the state before the first token."""
        self.conv[slot].zero_()
        self.matrix[slot].zero_()


LayerStore = LayerCache | StateCache | None


@dataclass(frozen=True)
class PoolSizes:
    """How much of each kind there is, page 0 and slot 0 not counted."""

    pages: int
    page_tokens: int
    window_pages: int = 0
    states: int = 0


def kept_bytes(specs: Sequence[CacheSpec | None], stores: Sequence[LayerStore]) -> dict[str, int]:
    """What the stores take, by kind: "KV pages", "window pages", "states"."""
    found: dict[str, int] = {}
    for spec, store in zip(specs, stores, strict=True):
        if isinstance(store, StateCache):
            kind, size = "states", store.conv.nbytes + store.matrix.nbytes
        elif store is not None:
            kind = "window pages" if isinstance(spec, WindowSpec) else "KV pages"
            size = store.k.nbytes + (0 if isinstance(spec, LatentSpec) else store.v.nbytes)
        else:
            continue
        found[kind] = found.get(kind, 0) + size
    return found


def allocate_pool(
    specs: Sequence[CacheSpec | None],
    sizes: PoolSizes,
    format: KvFormat,
    device: torch.device,
    scales: Sequence[tuple[float, float]] = (),
) -> tuple[LayerStore, ...]:
    """One store per spec; `scales`: of keys and values, per spec. Zero-filled, so that a masked row times a
    probability of zero is zero and not NaN. States are float32, whatever the format."""

    def zeros(pages: int, row: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(pages + 1, sizes.page_tokens, *row, dtype=format.DTYPE, device=device)

    recurrent = [spec for spec in specs if isinstance(spec, RecurrentSpec)]
    states = {
        spec: iter(_states(spec, recurrent.count(spec), sizes.states, device))
        for spec in dict.fromkeys(recurrent)
    }
    stores: list[LayerStore] = []
    for spec, (k_scale, v_scale) in zip(specs, scales or [NO_SCALES] * len(specs), strict=True):
        if isinstance(spec, PagedSpec | WindowSpec):
            pages = sizes.pages if isinstance(spec, PagedSpec) else sizes.window_pages
            k, v = (zeros(pages, row) for row in spec.row_shapes)
            stores.append(LayerCache(k, v, format, (k_scale, v_scale)))
        elif isinstance(spec, LatentSpec):
            (row,) = spec.row_shapes
            k = zeros(sizes.pages, row)
            stores.append(LayerCache(k, k[..., : spec.latent_dim], format, (k_scale, k_scale)))
        elif isinstance(spec, RecurrentSpec):
            stores.append(next(states[spec]))
        else:
            stores.append(None)
    return tuple(stores)


def _states(spec: RecurrentSpec, layers: int, slots: int, device: torch.device) -> list[StateCache]:
    """Of the layers that have this spec, in order."""
    shapes = [(layers, slots + 1, *shape) for shape in spec.state_shapes]
    stack = StateStack(*(torch.zeros(shape, device=device) for shape in shapes))
    return [StateCache(stack.conv[i], stack.matrix[i], stack) for i in range(layers)]
