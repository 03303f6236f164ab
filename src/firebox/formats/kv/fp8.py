"""Keys and values in FP8 (e4m3fn), 1 byte each: code = round(value / scale), value = code · scale.

A layer has one scale for its keys and one for its values: the checkpoint's, where it was calibrated (see
base.py), else 1.0. Relative to a value, rounding is off by 2^-4 at most; between scale · 2^-6 and zero it is
off by scale · 2^-10 at most. The largest code is 448.
"""

from __future__ import annotations

import torch

DTYPE = torch.float8_e4m3fn
SCALED = True
LARGEST = 448.0


def encode(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Rounded to the nearest, ties to even, after a division in float32. What lies beyond ±448 · scale,
    infinity included, becomes ±448; NaN stays NaN."""
    # e4m3fn has no infinity: whether a cast saturates or makes NaN depends on the release of torch
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(DTYPE)


def decode(stored: torch.Tensor, scale: float) -> torch.Tensor:
    """code · scale, one product in float32."""
    return stored.float() * scale
