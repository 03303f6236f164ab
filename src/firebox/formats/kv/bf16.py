"""Keys and values in bfloat16: the numbers as they are, 2 bytes each."""

from __future__ import annotations

import torch

DTYPE = torch.bfloat16
SCALED = False


def encode(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Rounded to the nearest, ties to even; exact where bf16 is what the layer computes in."""
    return rows.to(DTYPE)


def decode(stored: torch.Tensor, scale: float) -> torch.Tensor:
    """Widened, exactly."""
    return stored.float()
