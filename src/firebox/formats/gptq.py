"""GPTQ (Frantar et al., 2022): w[r, c] = (code[c, r] − zero[g, r]) · scale[g, r] with g = g_idx[c], or c //
group without one.

AutoGPTQ's layout, stored transposed: `qweight` [columns · bits / 32, rows] int32, the lowest bits of a word
first along the columns; `qzeros` [groups, rows · bits / 32] int32, packed along the rows, each one less than
the zero it means (checkpoint_format "gptq"; "gptq_v2" stores it as it is); `scales` [groups, rows]; `g_idx`
[columns] int32. With `desc_act` the columns are quantised in another order, so g_idx is not sorted, and
cutting columns would part groups. 4 and 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from firebox.formats.base import HALVES, TensorSpec


@dataclass(frozen=True)
class Format:
    """See firebox.formats.base.Format. `group` 0: one group for all columns. `zero_offset`: what is added to
    stored zeros."""

    group: int = 128
    bits: int = 4
    zero_offset: int = 1
    desc_act: bool = False
    name: str = "gptq"

    def tensors(self, rows: int, columns: int) -> Mapping[str, TensorSpec]:
        """Codes, zero points, scales, perhaps the columns' groups."""
        groups = -(-columns // self.group) if self.group else 1
        return {
            "qweight": TensorSpec((columns * self.bits // 32, rows), (torch.int32,)),
            "qzeros": TensorSpec((groups, rows * self.bits // 32), (torch.int32,)),
            "scales": TensorSpec((groups, rows), HALVES),
            "g_idx": TensorSpec((columns,), (torch.int32, torch.int64), optional=True),
        }

    def dequantise(self, tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
        """In float32."""
        codes = self._unpack(tensors["qweight"].T.contiguous())  # [rows, columns]
        zeros = self._unpack(tensors["qzeros"]).T + self.zero_offset  # [rows, groups]
        if "g_idx" in tensors:
            group_of = tensors["g_idx"].long()
        else:
            group_of = torch.arange(columns) // (self.group or columns)
        scales = tensors["scales"].float().T
        return (codes - zeros[:, group_of]).float() * scales[:, group_of]

    def cut_unit(self, axis: int) -> int:
        """Rows between words; columns between groups, and nowhere with desc_act."""
        if axis == 0:
            return 32 // self.bits
        return 1 << 62 if self.desc_act or not self.group else self.group

    def _unpack(self, packed: torch.Tensor) -> torch.Tensor:
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        return ((packed.unsqueeze(-1) >> shifts) & ((1 << self.bits) - 1)).flatten(-2)
