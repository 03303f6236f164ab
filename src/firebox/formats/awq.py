"""AWQ (Lin et al., 2023): w[r, c] = (code[c, r] − zero[c // group, r]) · scale[c // group, r].

AutoAWQ's "gemm" layout, stored transposed: `qweight` [columns, rows / 8] int32, `qzeros` [columns / group,
rows / 8] int32, `scales` [columns / group, rows]. The eight codes of a word, from the lowest bits up, stand
for rows 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from firebox.formats.base import HALVES, TensorSpec
from firebox.formats.int4_group import PER_WORD, unpack_words

# where row i of a word's eight stands in it
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Format:
    """See firebox.formats.base.Format."""

    group: int = 128
    name: str = "awq"

    def tensors(self, rows: int, columns: int) -> Mapping[str, TensorSpec]:
        """Codes, zero points, scales."""
        groups = -(-columns // self.group)
        return {
            "qweight": TensorSpec((columns, rows // PER_WORD), (torch.int32,)),
            "qzeros": TensorSpec((groups, rows // PER_WORD), (torch.int32,)),
            "scales": TensorSpec((groups, rows), HALVES),
        }

    def dequantise(self, tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
        """In float32."""

        def codes(packed: torch.Tensor) -> torch.Tensor:
            words: torch.Tensor = unpack_words(packed).unflatten(1, (-1, PER_WORD))
            return words[..., PLACES].flatten(1).float()

        def wide(per_group: torch.Tensor) -> torch.Tensor:
            return per_group.repeat_interleave(self.group, 0)[:columns]

        weight = (codes(tensors["qweight"]) - wide(codes(tensors["qzeros"]))) * wide(
            tensors["scales"].float()
        )
        return weight.T.contiguous()

    def cut_unit(self, axis: int) -> int:
        """Rows between words, columns between groups."""
        return PER_WORD if axis == 0 else self.group
