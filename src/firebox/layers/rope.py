"""Rotary position embedding (Su et al., 2021), and YaRN, which stretches it (Peng et al., 2023,
arXiv:2309.00071)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters. Frequencies that turn fewer than `beta_slow` times within `original_positions` are
    divided by `factor`, those that turn more than `beta_fast` times are kept, with a ramp in between; cos and
    sin are multiplied by `attention_factor`. `truncate`: the ramp begins and ends at whole dimensions."""

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's correction of the attention's temperature: 0.1 · weight · ln(factor) + 1, and 1 without
    stretching."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def rotary_tables(
    max_positions: int, rotary_dim: int, theta: float, device: torch.device, yarn: Yarn | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [max_positions, rotary_dim / 2] float32 of position · theta^(−2i / rotary_dim), or
    YaRN's."""
    if device.type == "meta":  # there torch.arange imports half a second of torch
        shape = (max_positions, rotary_dim // 2)
        return torch.empty(shape, device=device), torch.empty(shape, device=device)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    wavelengths = theta**exponents  # in tokens, over 2π
    frequencies = 1.0 / wavelengths  # multiplied by below: dividing the position rounds otherwise
    if yarn is not None:
        frequencies = _stretched(wavelengths, rotary_dim, theta, yarn)
    angles = torch.arange(max_positions, dtype=torch.float32, device=device).unsqueeze(-1) * frequencies
    scale = 1.0 if yarn is None else yarn.attention_factor
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first 2 · cos.shape[-1] dimensions of `x` [tokens, heads, head_dim], first half against
    second, as in GPT-NeoX; cos, sin [tokens, 1, rotary_dim / 2]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates all dimensions of `x` [tokens, heads, rotary_dim], each even one against the odd one behind it,
    as DeepSeek's checkpoints are trained; cos, sin [tokens, 1, rotary_dim / 2]. The even ones come out first,
    then the odd ones: queries and keys are permuted alike, so their products do not change."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _stretched(wavelengths: torch.Tensor, rotary_dim: int, theta: float, yarn: Yarn) -> torch.Tensor:
    """YaRN's frequencies, rounded step by step as in transformers: at position 100,000 the last bit of a
    frequency is 2e-4 in the angle."""

    def dimension(turns: float) -> float:
        """Where a frequency turns so many times within the original context."""
        return rotary_dim * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    steps = torch.arange(rotary_dim // 2, dtype=torch.float32, device=wavelengths.device)
    keep = 1 - ((steps - low) / (high - low or 0.001)).clamp(0, 1)  # 1: keep, 0: divide
    return 1.0 / (yarn.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep
