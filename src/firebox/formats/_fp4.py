"""The 4-bit float E2M1, two to a byte, as MXFP4 and NVFP4 store it."""

from __future__ import annotations

import torch

# by code: sign, two exponent bits, one mantissa bit
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """`packed` [..., n] uint8 → values [..., 2 · n] float32; the low four bits come first."""
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    return E2M1[codes.long()]
