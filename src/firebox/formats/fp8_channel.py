"""FP8 with a scale for each output channel: w[r, c] = code[r, c] · weight_scale[r].

`weight` [rows, columns] float8_e4m3fn, `weight_scale` [rows, 1]. compressed-tensors `float-quantized`,
strategy "channel" (zai-org/GLM-4.7-FP8, GLM-4.5-Air-FP8: activations are quantised per token at run time).
`quantise` makes them from an unquantised weight, as compressed-tensors does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from firebox.formats.base import TensorSpec

LARGEST = 448.0  # the largest code


def quantise(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`weight` [rows, columns], any float dtype → `weight` and a float32 `weight_scale`, in float32
    arithmetic: a row's scale makes its largest magnitude 448. A row of zeros gets float32's epsilon."""
    wide = weight.float()
    scale = wide.abs().amax(1, keepdim=True) / LARGEST  # [rows, 1]
    scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    codes = (wide / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}


@dataclass(frozen=True)
class Format:
    """See firebox.formats.base.Format."""

    name: str = "fp8_channel"

    def tensors(self, rows: int, columns: int) -> Mapping[str, TensorSpec]:
        """`weight`, `weight_scale`."""
        return {
            "weight": TensorSpec((rows, columns), (torch.float8_e4m3fn,)),
            "weight_scale": TensorSpec((rows, 1)),
        }

    def dequantise(self, tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
        """code · row scale in float32; NaN codes stay NaN."""
        return tensors["weight"].float() * tensors["weight_scale"].float()

    def cut_unit(self, axis: int) -> int:
        """Anywhere: a row takes its scale along, a cut row shares it."""
        return 1
