"""The frame that every decoder-only model here shares: embedding, blocks of attention and MLP, head, under
their usual names."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch

from firebox.attention.base import CacheSpec, LatentSpec
from firebox.formats.base import Slots
from firebox.formats.kv.base import NO_SCALES
from firebox.layers.embedding import Embedding
from firebox.layers.head import Head
from firebox.step import Step


class AttentionLike(Protocol):
    """The first half of a block: hidden states in and out, the residual included; writes the step's cache."""

    @property
    def backend(self) -> ModuleType | None:
        """What plans each step for it, if it needs that."""
        ...

    @property
    def kv_scales(self) -> torch.Tensor | None:
        """Its cache's scales of keys and values [2] float32; None where the KV format has none."""
        ...

    def slots(self) -> Slots:
        """Its checkpoint tensors."""
        ...

    def finish(self) -> None:
        """All slots are filled."""
        ...

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape."""
        ...


class MlpLike(Protocol):
    """The second half of a block: hidden states in and out, the residual included."""

    def slots(self) -> Slots:
        """Its checkpoint tensors."""
        ...

    def finish(self) -> None:
        """All slots are filled."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape."""
        ...


Block = tuple[AttentionLike, MlpLike]


class Decoder:
    """Runs the blocks in order. A model inherits this and builds the parts. `cache_specs`: one per block."""

    def __init__(
        self,
        embedding: Embedding,
        blocks: Sequence[Block],
        head: Head,
        cache_specs: Sequence[CacheSpec | None],
    ) -> None:
        self.embedding = embedding
        self.blocks = tuple(blocks)
        self.head = head
        self.cache_specs = tuple(cache_specs)
        backends = (attention.backend for attention, _ in self.blocks)
        self.attention_backend = next((backend for backend in backends if backend is not None), None)

    @property
    def _scaled(self) -> bool:
        return any(attention.kv_scales is not None for attention, _ in self.blocks)

    @property
    def kv_scales(self) -> tuple[tuple[float, float], ...]:
        """Each layer's scales of keys and values, once the slots are filled; 1.0 where there are none."""
        scales = (attention.kv_scales for attention, _ in self.blocks)
        return tuple(NO_SCALES if pair is None else (float(pair[0]), float(pair[1])) for pair in scales)

    def slots(self) -> Slots:
        """Every checkpoint tensor that is read, and where it goes."""
        yield from self.embedding.slots()
        for attention, mlp in self.blocks:
            yield from attention.slots()
            yield from mlp.slots()
        yield from self.head.slots()

    def unused(self, name: str) -> str | None:
        """Why a checkpoint tensor is not read: a tied head's copy of the embedding, or a scale for keys or
        values in FP8 where the cache has no use for it."""
        if name.endswith((".k_scale", ".v_scale")) and not self._scaled:
            return "the cache is not quantised with the checkpoint's scales"
        if name.endswith(".v_scale") and any(isinstance(spec, LatentSpec) for spec in self.cache_specs):
            return "a latent row is key and value at once and has the key's scale"
        return "tied to the embedding" if self.head.tied and name == f"{self.head.name}.weight" else None

    def finish(self) -> None:
        """Lets every layer bind its kernel."""
        for attention, mlp in self.blocks:
            attention.finish()
            mlp.finish()
        self.head.finish()

    def __call__(self, token_ids: torch.Tensor, step: Step) -> torch.Tensor:
        """`token_ids` [tokens] int64 → hidden states [tokens, hidden] before the final norm."""
        x = self.embedding(token_ids)
        for attention, mlp in self.blocks:
            x = mlp(attention(x, step))
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, hidden] → [rows, vocab] float32; the final norm is in here."""
        return self.head(x)
