"""What one layer keeps of the tokens it has seen. A model lists one spec per layer, or None for a layer that
keeps nothing.

PagedSpec       keys and values of every token                       "full" pages
LatentSpec      one compressed row per token (MLA)                   "full" pages
WindowSpec      keys and values of the last `window_tokens` tokens   "window" pages, freed behind it
RecurrentSpec   a state of fixed size                                one slot a request, and snapshots
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from firebox.errors import UnsupportedModel


@dataclass(frozen=True)
class PagedSpec:
    """Keys and values of grouped-query attention, one row per token, in pages that live as long as the
    request."""

    kv_heads: int
    head_dim: int

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """What is stored per token: K and V."""
        return ((self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim))


@dataclass(frozen=True)
class LatentSpec:
    """One row per token for multi-head latent attention: the compressed keys and values, then the rotated
    part of the key that all heads share."""

    latent_dim: int
    rope_dim: int

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """What is stored per token: one row, seen as one key head whose first `latent_dim` values are the
        value."""
        return ((1, self.latent_dim + self.rope_dim),)


@dataclass(frozen=True)
class WindowSpec:
    """Like PagedSpec, but a token attends only to the last `window_tokens` tokens, itself included."""

    kv_heads: int
    head_dim: int
    window_tokens: int

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """What is stored per token: K and V."""
        return ((self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim))


@dataclass(frozen=True)
class RecurrentSpec:
    """A state that every token changes: a convolution's last inputs [channels, taps] and a matrix per head
    [heads, key_dim, value_dim], float32."""

    conv_channels: int
    conv_taps: int
    heads: int
    key_dim: int
    value_dim: int

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """What is stored per request."""
        return ((self.conv_channels, self.conv_taps), (self.heads, self.key_dim, self.value_dim))


CacheSpec = PagedSpec | LatentSpec | WindowSpec | RecurrentSpec


@dataclass(frozen=True)
class CacheNeeds:
    """What a model's layers keep, added up. `window_tokens` None: no layer has a window. Bytes are over all
    layers of the kind."""

    full_bytes_per_token: int
    window_tokens: int | None
    window_bytes_per_token: int
    state_bytes: int


def cache_needs(specs: Sequence[CacheSpec | None], dtype_bytes: int) -> CacheNeeds:
    """Adds up the layers; `dtype_bytes` of keys and values (states are float32). Raises UnsupportedModel for
    windows of two sizes."""

    def rows(kind: type[PagedSpec] | type[LatentSpec] | type[WindowSpec]) -> int:
        return sum(
            math.prod(shape) * dtype_bytes
            for spec in specs
            if isinstance(spec, kind)
            for shape in spec.row_shapes
        )

    windows = {spec.window_tokens for spec in specs if isinstance(spec, WindowSpec)}
    if len(windows) > 1:
        raise UnsupportedModel(
            f"layers with windows of {sorted(windows)} tokens; this code supports one size"
        )
    return CacheNeeds(
        full_bytes_per_token=rows(PagedSpec) + rows(LatentSpec),
        window_tokens=next(iter(windows), None),
        window_bytes_per_token=rows(WindowSpec),
        state_bytes=sum(
            4 * math.prod(shape)
            for spec in specs
            if isinstance(spec, RecurrentSpec)
            for shape in spec.state_shapes
        ),
    )
