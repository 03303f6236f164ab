"""What one layer keeps for every token it has seen. A model lists one spec per layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PagedSpec:
    """Keys and values of grouped-query attention, one row per token, in pages that live as long as the
    request."""

    kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of one layer's K and V for one token."""
        return 2 * self.kv_heads * self.head_dim * dtype_bytes
