"""Root-mean-square norm (Zhang & Sennrich, 2019)."""

from __future__ import annotations

import torch

from firebox.formats.base import Slot, Slots
from firebox.layers.base import Build


class RMSNorm:
    """weight · x / √(mean(x²) + eps) over the last dimension, computed in float32, returned in x's dtype."""

    def __init__(self, build: Build, width: int, eps: float) -> None:
        self.weight = build.empty(width)
        self.eps = eps

    def slots(self, name: str) -> Slots:
        """The checkpoint's `{name}.weight`."""
        yield Slot(f"{name}.weight", self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., width] → the same shape."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
