"""The frame that every decoder-only model here shares: embedding, blocks of attention and MLP, head, under
their usual names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from firebox.formats.base import Slots
from firebox.layers.attention import AttentionBlock
from firebox.layers.dense import DenseBlock
from firebox.layers.embedding import Embedding
from firebox.layers.head import Head
from firebox.layers.moe import MoeBlock
from firebox.step import Step

Block = tuple[AttentionBlock, DenseBlock | MoeBlock]


class Decoder:
    """Runs the blocks in order. A model inherits this and builds the parts."""

    def __init__(self, embedding: Embedding, blocks: Sequence[Block], head: Head) -> None:
        self.embedding = embedding
        self.blocks = tuple(blocks)
        self.head = head
        self.attention_backend = self.blocks[0][0].backend if self.blocks else None

    def slots(self) -> Slots:
        """Names as published by Hugging Face, one tensor per expert."""
        yield from self.embedding.slots("model.embed_tokens")
        for layer, (attention, mlp) in enumerate(self.blocks):
            prefix = f"model.layers.{layer}"
            yield from attention.slots(f"{prefix}.input_layernorm", f"{prefix}.self_attn")
            yield from mlp.slots(f"{prefix}.post_attention_layernorm", f"{prefix}.mlp")
        yield from self.head.slots("model.norm", "lm_head")

    def unused(self, name: str) -> str | None:
        """Why a checkpoint tensor is not read: only a tied head's copy of the embedding."""
        return "tied to the embedding" if self.head.tied and name == "lm_head.weight" else None

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
