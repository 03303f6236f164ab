"""NVFP4: E2M1 codes, an FP8 scale for each 16 along a row, and one float32 scale for the whole weight.

    modelopt             w = E2M1[code] · weight_scale · weight_scale_2
    compressed-tensors   w = E2M1[code] · (weight_scale / weight_global_scale)

modelopt stores `weight` [rows, columns / 2] uint8, `weight_scale` [rows, columns / 16] float8_e4m3fn,
`weight_scale_2` and, for static activations, `input_scale`. compressed-tensors (`nvfp4-pack-quantized`)
stores `weight_packed`, `weight_scale`, `weight_global_scale` (the inverse of the other's) and perhaps
`input_global_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from firebox.formats._fp4 import unpack
from firebox.formats.base import TensorSpec

GROUP = 16


@dataclass(frozen=True)
class Format:
    """See firebox.formats.base.Format. `spelling`: "modelopt" or "compressed_tensors"."""

    spelling: str = "modelopt"
    name: str = "nvfp4"

    def tensors(self, rows: int, columns: int) -> Mapping[str, TensorSpec]:
        """Codes, group scales, the weight's scale; perhaps the activations'."""
        modelopt = self.spelling == "modelopt"
        return {
            "weight" if modelopt else "weight_packed": TensorSpec((rows, columns // 2), (torch.uint8,)),
            "weight_scale": TensorSpec((rows, -(-columns // GROUP)), (torch.float8_e4m3fn,)),
            "weight_scale_2" if modelopt else "weight_global_scale": TensorSpec(()),
            "input_scale" if modelopt else "input_global_scale": TensorSpec((), optional=True),
        }

    def dequantise(self, tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
        """In float32, in the order of the formulas above."""
        if self.spelling == "modelopt":
            scales = tensors["weight_scale"].float() * tensors["weight_scale_2"].float()
            codes = tensors["weight"]
        else:
            scales = tensors["weight_scale"].float() / tensors["weight_global_scale"].float()
            codes = tensors["weight_packed"]
        return unpack(codes) * scales.repeat_interleave(GROUP, 1)[:, :columns]

    def cut_unit(self, axis: int) -> int:
        """Only between groups."""
        return GROUP if axis == 1 else 1
