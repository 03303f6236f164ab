"""A linear map whose weight may be several checkpoint tensors stacked row-wise (q, k, v; gate, up)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from firebox.formats.base import Slot, Slots
from firebox.layers.base import Build


class Linear:
    """y = x · weightᵀ (+ bias). `parts`: checkpoint name → rows, in the order they are stacked."""

    def __init__(self, build: Build, in_features: int, parts: dict[str, int], bias: bool = False) -> None:
        self.parts = parts
        rows = sum(parts.values())
        self.weight = build.empty(rows, in_features)
        self.bias = build.empty(rows) if bias else None

    def slots(self, prefix: str) -> Slots:
        """The checkpoint's `{prefix}{part}.weight` and `.bias`."""
        first = 0
        for name, rows in self.parts.items():
            yield Slot(f"{prefix}{name}.weight", self.weight[first : first + rows])
            if self.bias is not None:
                yield Slot(f"{prefix}{name}.bias", self.bias[first : first + rows])
            first += rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, in_features] → [tokens, rows]."""
        return F.linear(x, self.weight, self.bias)
