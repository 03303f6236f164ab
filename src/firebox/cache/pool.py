"""The tensors behind the page ids: one K and one V tensor per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from firebox.cache.specs import PagedSpec


@dataclass(frozen=True)
class LayerCache:
    """`k` and `v` [pages + 1, page_tokens, kv_heads, head_dim]; slot s is page s // page_tokens, row s %
    page_tokens."""

    k: torch.Tensor
    v: torch.Tensor

    def write(self, token_slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores `k` and `v` [tokens, kv_heads, head_dim] at `token_slots` [tokens] int64."""
        self.k.flatten(0, 1).index_copy_(0, token_slots, k.to(self.k.dtype))
        self.v.flatten(0, 1).index_copy_(0, token_slots, v.to(self.v.dtype))


def allocate_pool(
    specs: Sequence[PagedSpec], pages: int, page_tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[LayerCache, ...]:
    """One LayerCache per spec. Zero-filled, so that a masked row times a probability of zero is zero and not
    NaN."""
    return tuple(
        LayerCache(
            *(
                torch.zeros(pages + 1, page_tokens, spec.kv_heads, spec.head_dim, dtype=dtype, device=device)
                for _ in range(2)
            )
        )
        for spec in specs
    )
