"""4-bit integers with a scale for each group along a row: w[r, c] = (code[r, c] − zero[r, c // group]) ·
scale[r, c // group].

compressed-tensors `pack-quantized`: `weight_packed` [rows, ⌈columns / 8⌉] int32, eight codes to a word, the
first in the lowest bits, each stored plus 8; `weight_scale` [rows, ⌈columns / group⌉]; `weight_shape` [2];
asymmetric ones `weight_zero_point` [⌈rows / 8⌉, groups] int32, packed along the rows. Kimi-K2.5 and
K2-Thinking: symmetric, groups of 32. `group` 0: one scale a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from firebox.formats.base import HALVES, TensorSpec

PER_WORD = 8


@dataclass(frozen=True)
class Format:
    """See firebox.formats.base.Format."""

    group: int = 32
    symmetric: bool = True
    name: str = "int4_group"

    def tensors(self, rows: int, columns: int) -> Mapping[str, TensorSpec]:
        """Codes, scales, shape, perhaps zero points."""
        groups = -(-columns // self.group) if self.group else 1
        found = {
            "weight_packed": TensorSpec((rows, -(-columns // PER_WORD)), (torch.int32,)),
            "weight_scale": TensorSpec((rows, groups), HALVES),
            "weight_shape": TensorSpec((2,), (torch.int64, torch.int32)),
        }
        if not self.symmetric:
            found["weight_zero_point"] = TensorSpec((-(-rows // PER_WORD), groups), (torch.int32,))
        return found

    def dequantise(self, tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
        """In float32."""
        codes = (unpack_words(tensors["weight_packed"])[:, :columns] - 8).float()
        scales = tensors["weight_scale"].float()
        if not self.symmetric:
            zeros = (unpack_words(tensors["weight_zero_point"].T.contiguous()).T[:rows] - 8).float()
            codes = codes - self._wide(zeros, columns)
        return codes * self._wide(scales, columns)

    def cut_unit(self, axis: int) -> int:
        """Columns between groups and words; rows anywhere, unless zero points are packed along them."""
        if axis == 0:
            return 1 if self.symmetric else PER_WORD
        return max(self.group, PER_WORD)

    def _wide(self, per_group: torch.Tensor, columns: int) -> torch.Tensor:
        return per_group.repeat_interleave(self.group or columns, 1)[:, :columns]


def unpack_words(packed: torch.Tensor) -> torch.Tensor:
    """`packed` [n, words] int32 → codes [n, 8 · words] int32 in 0 … 15, the lowest bits of a word first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 0xF).flatten(-2)
