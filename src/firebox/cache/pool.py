"""The tensors behind page ids and state slots: for each layer what its spec asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from firebox.cache.specs import CacheSpec, LatentSpec, PagedSpec, RecurrentSpec, WindowSpec


@dataclass(frozen=True)
class LayerCache:
    """`k` and `v` [pages + 1, page_tokens, kv_heads, head_dim]; slot s is page s // page_tokens, row s %
    page_tokens. For a latent layer `v` is a view of `k`'s first `latent_dim` columns."""

    k: torch.Tensor
    v: torch.Tensor

    def write(self, token_slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
        """Stores `k` and, unless it is a view of it, `v` [tokens, kv_heads, head_dim] at `token_slots`
        [tokens] int64."""
        self.k.flatten(0, 1).index_copy_(0, token_slots, k.to(self.k.dtype))
        if v is not None:
            self.v.flatten(0, 1).index_copy_(0, token_slots, v.to(self.v.dtype))


@dataclass(frozen=True)
class StateCache:
    """A recurrent layer's states by slot: `conv` [slots, channels, taps] and `matrix` [slots, heads, key_dim,
    value_dim], float32. Slot 0 is always zero: the state before the first token."""

    conv: torch.Tensor
    matrix: torch.Tensor

    def copy(self, source: int, target: int) -> None:
        """The state in slot `source` to slot `target`."""
        self.conv[target].copy_(self.conv[source])
        self.matrix[target].copy_(self.matrix[source])


LayerStore = LayerCache | StateCache | None


@dataclass(frozen=True)
class PoolSizes:
    """How much of each kind there is, page 0 and slot 0 not counted."""

    pages: int
    page_tokens: int
    window_pages: int = 0
    states: int = 0


def allocate_pool(
    specs: Sequence[CacheSpec | None], sizes: PoolSizes, dtype: torch.dtype, device: torch.device
) -> tuple[LayerStore, ...]:
    """One store per spec. Zero-filled, so that a masked row times a probability of zero is zero and not
    NaN."""

    def zeros(pages: int, *row: int) -> torch.Tensor:
        return torch.zeros(pages + 1, sizes.page_tokens, *row, dtype=dtype, device=device)

    stores: list[LayerStore] = []
    for spec in specs:
        if isinstance(spec, PagedSpec):
            stores.append(LayerCache(*(zeros(sizes.pages, *row) for row in spec.row_shapes)))
        elif isinstance(spec, WindowSpec):
            stores.append(LayerCache(*(zeros(sizes.window_pages, *row) for row in spec.row_shapes)))
        elif isinstance(spec, LatentSpec):
            (row,) = spec.row_shapes
            k = zeros(sizes.pages, *row)
            stores.append(LayerCache(k, k[..., : spec.latent_dim]))
        elif isinstance(spec, RecurrentSpec):
            conv, matrix = (
                torch.zeros(sizes.states + 1, *shape, device=device) for shape in spec.state_shapes
            )
            stores.append(StateCache(conv, matrix))
        else:
            stores.append(None)
    return tuple(stores)
