"""A linear map whose weight may be several checkpoint modules stacked row-wise (q, k, v; gate, up)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from firebox.formats.base import PlainSlot, Slots, WeightSlot
from firebox.layers.base import Build


class Linear:
    """y = x · weightᵀ (+ bias). `parts`: module path → rows, in the order they are stacked; each part has its
    own format, which its path decides. Quantised parts are dequantised when they are loaded. `requantisable`:
    unquantised parts may become FP8 (--requantize); not so the few numbers that gate others."""

    def __init__(
        self,
        build: Build,
        in_features: int,
        parts: dict[str, int],
        *,
        bias: bool = False,
        requantisable: bool = True,
    ) -> None:
        self.parts = parts
        rows = sum(parts.values())
        self.weight = build.empty(rows, in_features)
        self.bias = build.empty(rows) if bias else None
        self._format_of = build.format_of
        self._requantisable = requantisable

    def slots(self) -> Slots:
        """Each part's weight, in its format, and its `.bias`."""
        first = 0
        for path, rows in self.parts.items():
            target = self.weight[first : first + rows]
            yield WeightSlot(path, self._format_of(path), target, requantisable=self._requantisable)
            if self.bias is not None:
                yield PlainSlot(f"{path}.bias", self.bias[first : first + rows])
            first += rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, in_features] → [tokens, rows]."""
        return F.linear(x, self.weight, self.bias)
