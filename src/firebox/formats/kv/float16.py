"""Keys and values in float16: the numbers as they are, 2 bytes each."""

from __future__ import annotations

import torch

DTYPE = torch.float16
SCALED = False


def encode(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Rounded to the nearest, ties to even; beyond ±65504 infinite, as float16 arithmetic itself is."""
    return rows.to(DTYPE)


def decode(stored: torch.Tensor, scale: float) -> torch.Tensor:
    """Widened, exactly."""
    return stored.float()
