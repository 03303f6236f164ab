"""FP8 with one scale for the whole weight: w = code · weight_scale.

`weight` [rows, columns] float8_e4m3fn (e5m2 is refused by the loader), `weight_scale` a scalar or [1];
`input_scale`, where there is one, belongs to statically quantised activations and is not part of the weight.
Spelled so by modelopt, by AutoFP8 and by compressed-tensors (`float-quantized`, strategy "tensor");
transformers (quant_method "fp8" without weight_block_size) calls the scales `weight_scale_inv` and
`activation_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from firebox.formats.base import TensorSpec


@dataclass(frozen=True)
class Format:
    """See firebox.formats.base.Format. `scale`, `input_scale`: what the scales are called."""

    scale: str = "weight_scale"
    input_scale: str = "input_scale"
    name: str = "fp8_tensor"

    def tensors(self, rows: int, columns: int) -> Mapping[str, TensorSpec]:
        """`weight` and its scale, perhaps the activations'."""
        return {
            "weight": TensorSpec((rows, columns), (torch.float8_e4m3fn,)),
            self.scale: TensorSpec(()),
            self.input_scale: TensorSpec((), optional=True),
        }

    def dequantise(self, tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
        """code · scale in float32; NaN codes stay NaN."""
        return tensors["weight"].float() * tensors[self.scale].float()

    def cut_unit(self, axis: int) -> int:
        """Anywhere: every shard keeps the scale."""
        return 1
