"""Token ids to hidden states."""

from __future__ import annotations

import torch

from firebox.formats.base import Slot, Slots
from firebox.layers.base import Build


class Embedding:
    """`weight` [vocab, hidden]."""

    def __init__(self, build: Build, vocab: int, hidden: int) -> None:
        self.weight = build.empty(vocab, hidden)

    def slots(self, name: str) -> Slots:
        """The checkpoint's `{name}.weight`."""
        yield Slot(f"{name}.weight", self.weight)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`token_ids` [tokens] int64 → [tokens, hidden]."""
        return self.weight[token_ids]
