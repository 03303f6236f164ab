"""Rotary position embedding (Su et al., 2021), first half against second half of the rotated dimensions, as
in GPT-NeoX."""

from __future__ import annotations

import torch


def rotary_tables(
    max_positions: int, rotary_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [max_positions, rotary_dim / 2] float32 of position · theta^(−2i / rotary_dim)."""
    frequencies = 1.0 / theta ** (
        torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    )
    angles = torch.arange(max_positions, dtype=torch.float32, device=device).unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first 2 · cos.shape[-1] dimensions of `x` [tokens, heads, head_dim]; cos, sin [tokens, 1,
    rotary_dim / 2]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
