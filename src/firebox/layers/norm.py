"""Root-mean-square norm (Zhang & Sennrich, 2019)."""

from __future__ import annotations

import torch

from firebox.formats.base import Cut, PlainSlot, Slots
from firebox.layers.base import Build


class RMSNorm:
    """weight · x / √(mean(x²) + eps) over the last dimension, computed in float32, returned in x's dtype.
    With `plus_one` the checkpoint stores weight − 1 (Qwen3.5, Gemma). `cut`: of a norm over heads that tensor
    parallelism divides."""

    def __init__(
        self,
        build: Build,
        name: str,
        width: int,
        eps: float,
        *,
        plus_one: bool = False,
        cut: Cut | None = None,
    ) -> None:
        self.name = name
        self.weight = build.empty(width)
        self.eps = eps
        self._plus_one, self._cut = plus_one, cut

    def slots(self) -> Slots:
        """The checkpoint's `{name}.weight`."""
        stored = tuple(self.weight.shape)
        arrange = (lambda weight: weight.float() + 1.0) if self._plus_one else None
        yield PlainSlot(f"{self.name}.weight", self.weight, stored, arrange, cut=self._cut)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., width] → the same shape."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
