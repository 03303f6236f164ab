"""A linear map whose weight may be several checkpoint modules stacked row-wise (q, k, v; gate, up)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from firebox.formats.base import Cut, PlainSlot, Slots, WeightSlot
from firebox.layers.base import Build


class Linear:
    """y = x · weightᵀ (+ bias). `parts`: module path → rows, in the order they are stacked; each part has its
    own format, which its path decides. Quantised parts are dequantised when they are loaded. `requantisable`:
    unquantised parts may become FP8 (--requantize); not so the few numbers that gate others. `cuts`: how
    tensor parallelism divides each part; a bias is divided with the output features, and kept whole
    otherwise."""

    def __init__(
        self,
        build: Build,
        in_features: int,
        parts: dict[str, int],
        *,
        bias: bool = False,
        requantisable: bool = True,
        cuts: Sequence[Cut | None] = (),
    ) -> None:
        self.parts = parts
        self.cuts = tuple(cuts) or (None,) * len(parts)
        rows = sum(parts.values())
        self.weight = build.empty(rows, in_features)
        self.bias = build.empty(rows) if bias else None
        self._format_of = build.format_of
        self._requantisable = requantisable and build.requantisable

    def slots(self) -> Slots:
        """Each part's weight, in its format, and its `.bias`."""
        first = 0
        for (path, rows), cut in zip(self.parts.items(), self.cuts, strict=True):
            target, format = self.weight[first : first + rows], self._format_of(path)
            yield WeightSlot(path, format, target, requantisable=self._requantisable, cut=cut)
            if self.bias is not None:
                along = cut if cut is not None and cut.axis == 0 else None
                yield PlainSlot(f"{path}.bias", self.bias[first : first + rows], cut=along)
            first += rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, in_features] → [tokens, rows]."""
        return F.linear(x, self.weight, self.bias)
