"""MXFP4: E2M1 codes with a power of two for each 32 along a row: w[r, c] = E2M1[code[r, c]] · 2^(scale[r, c
// 32] − 127).

OCP Microscaling Formats v1.0. gpt-oss stores `blocks` [rows, columns / 32, 16] uint8 and `scales` [rows,
columns / 32] uint8 (E8M0; 255 is NaN), all experts in one tensor, so its names end in "_blocks" and
"_scales". compressed-tensors (`mxfp4-pack-quantized`) stores `weight_packed` [rows, columns / 2] and
`weight_scale` [rows, columns / 32].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from firebox.formats._fp4 import unpack
from firebox.formats.base import TensorSpec

GROUP = 32


@dataclass(frozen=True)
class Format:
    """See firebox.formats.base.Format. `spelling`: "gpt_oss" or "compressed_tensors"."""

    spelling: str = "gpt_oss"
    name: str = "mxfp4"

    def tensors(self, rows: int, columns: int) -> Mapping[str, TensorSpec]:
        """Codes and scales."""
        groups = -(-columns // GROUP)
        scales = TensorSpec((rows, groups), (torch.uint8,))
        if self.spelling == "gpt_oss":
            return {"blocks": TensorSpec((rows, groups, GROUP // 2), (torch.uint8,)), "scales": scales}
        return {"weight_packed": TensorSpec((rows, columns // 2), (torch.uint8,)), "weight_scale": scales}

    def dequantise(self, tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
        """Exact: float32 holds every product below 2^128; those above become infinite."""
        codes, scales = (tensors[name] for name in self.tensors(rows, columns))
        values = unpack(codes.reshape(rows, -1, GROUP // 2))  # [rows, groups, 32]
        return (values * e8m0(scales).unsqueeze(-1)).flatten(1)[:, :columns]

    def cut_unit(self, axis: int) -> int:
        """Only between groups."""
        return GROUP if axis == 1 else 1


def e8m0(scales: torch.Tensor) -> torch.Tensor:
    """2^(s − 127) in float32 for `scales` uint8; NaN for 255. Zero stands for 2^−127, a subnormal number."""
    values = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
    return values.masked_fill(scales == 255, torch.nan)
