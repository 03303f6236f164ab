"""The frame that every decoder-only model here shares: embedding, blocks of attention and MLP, head, under
their usual names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from firebox.attention.base import CacheSpec, LatentSpec
from firebox.formats.base import Slots
from firebox.formats.kv.base import NO_SCALES
from firebox.layers.base import AttentionLike, Block
from firebox.layers.embedding import Embedding
from firebox.layers.head import Head
from firebox.layers.mtp import MtpLayer
from firebox.step import Step


class Decoder:
    """Runs the blocks in order. A model inherits this and builds the parts. `cache_specs`: one per block.
    `mtp`: the MTP layers that the checkpoint holds, which nothing here runs."""

    def __init__(
        self,
        embedding: Embedding,
        blocks: Sequence[Block],
        head: Head,
        cache_specs: Sequence[CacheSpec | None],
        mtp: Sequence[MtpLayer] = (),
    ) -> None:
        self.embedding = embedding
        self.blocks = tuple(blocks)
        self.head = head
        self.cache_specs = tuple(cache_specs)
        self.mtp = tuple(mtp)
        backends = (attention.backend for attention, _ in self.blocks)
        self.attention_backend = next((backend for backend in backends if backend is not None), None)

    @property
    def not_capturable(self) -> str:
        """Why no CUDA graph can hold a step, or ""."""
        blocks = [block for pair in self.blocks for block in pair if not block.capturable]
        return f"{type(blocks[0]).__name__} is composed of torch operators" if blocks else ""

    @property
    def _scaled(self) -> bool:
        return any(attention.kv_scales is not None for attention, _ in self.blocks)

    @property
    def kv_scales(self) -> tuple[tuple[float, float], ...]:
        """Each layer's scales of keys and values, once the slots are filled; 1.0 where there are none."""
        return tuple(_scales(attention) for attention, _ in self.blocks)

    @property
    def mtp_cache_specs(self) -> tuple[CacheSpec, ...]:
        """What the MTP layers keep; whoever runs them puts their stores behind those of `cache_specs`."""
        return tuple(layer.spec for layer in self.mtp)

    @property
    def mtp_kv_scales(self) -> tuple[tuple[float, float], ...]:
        """The same as `kv_scales`, of the MTP layers."""
        return tuple(_scales(layer.attention) for layer in self.mtp)

    def slots(self) -> Slots:
        """Every checkpoint tensor that is read, and where it goes."""
        yield from self.embedding.slots()
        for attention, mlp in self.blocks:
            yield from attention.slots()
            yield from mlp.slots()
        yield from self.head.slots()
        for layer in self.mtp:
            yield from layer.slots()

    def unused(self, name: str) -> str | None:
        """Why a checkpoint tensor is not read: a tied head's copy of the embedding, an MTP layer's of it or
        of the output matrix, or a scale for keys or values in FP8 where the cache has no use for it."""
        for layer in self.mtp:
            if (why := layer.unused(name)) is not None:
                return why
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
        for layer in self.mtp:
            layer.finish()

    def __call__(self, token_ids: torch.Tensor, step: Step) -> torch.Tensor:
        """`token_ids` [tokens] int64 → hidden states [rows, hidden] before the final norm, of the tokens that
        the step wants. Of the others the last block's keys and values are all that anybody reads."""
        x = self.embedding(token_ids)
        for attention, mlp in self.blocks[:-1]:
            x = mlp(attention(x, step))
        attention, mlp = self.blocks[-1]
        x = attention(x, step)
        if step.outputs is not None:
            x = x[step.outputs]
        return mlp(x) if len(x) else x

    def logits(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`x` [rows, hidden] → [rows, vocab] float32, in `out` where that is given; the final norm is in
        here."""
        return self.head(x, out)


def _scales(attention: AttentionLike) -> tuple[float, float]:
    pair = attention.kv_scales
    return NO_SCALES if pair is None else (float(pair[0]), float(pair[1]))
