"""Keys and values in float32: the numbers as they are, 4 bytes each."""

from __future__ import annotations

import torch

DTYPE = torch.float32
SCALED = False


def encode(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Exact."""
    return rows.to(DTYPE)


def decode(stored: torch.Tensor, scale: float) -> torch.Tensor:
    """As it is."""
    return stored.float()
