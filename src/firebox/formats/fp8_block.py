"""FP8 with a scale for each block of 128 × 128: w[r, c] = code[r, c] · weight_scale_inv[r // 128, c // 128].

`weight` [rows, columns] float8_e4m3fn, `weight_scale_inv` [⌈rows / 128⌉, ⌈columns / 128⌉] (the inverse of
what the quantiser multiplied by, hence the name). DeepSeek-V3's spelling, quant_method "fp8" with
weight_block_size; compressed-tensors stores the same, strategy "block", under `weight_scale`. Rows or
columns that do not fill their last block are allowed. Scales may be stored as powers of two (float8_e8m0fnu;
scale_fmt "ue8m0" in transformers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from firebox.formats.base import FLOATS, TensorSpec


@dataclass(frozen=True)
class Format:
    """See firebox.formats.base.Format. `block`: rows and columns of a block; `scale`: the scales' name."""

    block: tuple[int, int] = (128, 128)
    scale: str = "weight_scale_inv"
    name: str = "fp8_block"

    def tensors(self, rows: int, columns: int) -> Mapping[str, TensorSpec]:
        """`weight` and the scales."""
        return {
            "weight": TensorSpec((rows, columns), (torch.float8_e4m3fn,)),
            self.scale: TensorSpec(
                (-(-rows // self.block[0]), -(-columns // self.block[1])), (*FLOATS, torch.float8_e8m0fnu)
            ),
        }

    def dequantise(self, tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
        """code · block scale in float32; NaN codes stay NaN."""
        scales = tensors[self.scale].float()
        wide = scales.repeat_interleave(self.block[0], 0)[:rows].repeat_interleave(self.block[1], 1)[
            :, :columns
        ]
        return tensors["weight"].float() * wide

    def cut_unit(self, axis: int) -> int:
        """Only between blocks."""
        return self.block[axis]
