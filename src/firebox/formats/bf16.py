"""Unquantised weights: one tensor, `weight` [rows, columns], stored as bf16, fp16 or fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from firebox.formats.base import TensorSpec


@dataclass(frozen=True)
class Format:
    """See firebox.formats.base.Format."""

    name: str = "bf16"

    def tensors(self, rows: int, columns: int) -> Mapping[str, TensorSpec]:
        """`weight`."""
        return {"weight": TensorSpec((rows, columns))}

    def dequantise(self, tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
        """Widened, exactly."""
        return tensors["weight"].float()

    def cut_unit(self, axis: int) -> int:
        """Anywhere."""
        return 1
