"""Token ids to hidden states."""

from __future__ import annotations

import torch

from firebox.formats.base import Cut, PlainSlot, Slots
from firebox.layers.base import Build


class Embedding:
    """`weight` [vocab, hidden]."""

    def __init__(self, build: Build, name: str, vocab: int, hidden: int) -> None:
        self.name = name
        self.weight = build.empty(vocab, hidden)

    def slots(self) -> Slots:
        """The checkpoint's `{name}.weight`."""
        yield PlainSlot(f"{self.name}.weight", self.weight, cut=Cut(0, self.weight.shape[0], "vocab_size"))

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`token_ids` [tokens] int64 → [tokens, hidden]."""
        return self.weight[token_ids]
