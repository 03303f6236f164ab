"""Weights that nobody trained, in the layouts of the GPU kernels (`--load-format dummy`): about N(0, 1 /
columns) after dequantisation, every code in use; and how far what is computed with them is from what should
be.

Integers from −8 to 7 have a mean of −½, so scales of integers have either sign. Else every output has the
same share of the sum of its inputs, and after a few layers little else: Kimi-K2.5's routers then chose 27
experts for 8 tokens, where 60 are to be expected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from firebox.formats import layouts
from firebox.kernels._experts import BLOCK, FOUR_BIT, FP8, INT4_ZERO, MXFP4, NVFP4, word_bits

LEVEL = 100.0  # RMS of FP8 codes
E2M1_RMS, INT4_RMS = 2.93, 4.61  # of codes that are all equally likely
Parts = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def invented(
    format: str, group: int, lead: tuple[int, ...], columns: int, generator: torch.Generator,
    dtype: torch.dtype = torch.bfloat16, unit: int = 0,
) -> Parts:  # fmt: skip
    """w, scale and row_scale of matrices [*lead, columns]; `lead`: rows, or experts and rows; `unit`: of
    words, 0 for a group's."""
    device, size = generator.device, columns**-0.5
    if format in FP8:
        codes = torch.empty(*lead, columns, dtype=torch.float8_e4m3fn, device=device)
        flat = codes.view(-1, columns)
        for rows in flat.split(max(1, 2**27 // columns)):
            normal = torch.empty(rows.shape, dtype=torch.bfloat16, device=device)
            rows.copy_(normal.normal_(0.0, LEVEL, generator=generator).clamp_(-448, 448))
        if format == "fp8_block":
            blocks = (*lead[:-1], -(-lead[-1] // BLOCK), columns // BLOCK)
            return codes, torch.full(blocks, size / LEVEL, device=device), None
        return codes, None, torch.full(lead, size / LEVEL, device=device)
    if format in FOUR_BIT:
        stored = layouts.whole_units(columns, unit or group)
        words = torch.empty(*lead, stored // layouts.PER_WORD, dtype=torch.int16, device=device)
        words.random_(-(2**15), 2**15, generator=generator)
        if stored > columns:
            bits = layouts.bits_of_columns(columns, unit, word_bits(format)).view(torch.int16)
            words &= bits.to(device)
        return words.view(torch.uint16), *_scales(format, (*lead, columns // group), size, generator)
    values = torch.empty(*lead, columns, dtype=dtype, device=device)
    return values.normal_(0.0, size, generator=generator), None, None


def _scales(
    format: str, groups: tuple[int, ...], size: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    device = generator.device
    if format in MXFP4:
        code = 127 + round(math.log2(size / E2M1_RMS))
        return layouts.pad_groups(torch.full(groups, code, dtype=torch.uint8, device=device)), None
    if format in NVFP4:
        scale = torch.full(groups, LEVEL, device=device).to(torch.float8_e4m3fn)
        rows = torch.full(groups[:-1], size / E2M1_RMS / LEVEL, device=device)
        return layouts.pad_groups(scale), rows
    signs = torch.randint(0, 2, groups, generator=generator, device=device, dtype=torch.int8)
    scale = (2.0 * signs - 1.0) * (size / INT4_RMS)
    if format == INT4_ZERO:
        return layouts.pad_groups(layouts.pack_zeros(scale, torch.full_like(scale, 8.0))), None
    return layouts.pad_groups(scale.bfloat16()), None


def vary(scales: Iterable[torch.Tensor | None], generator: torch.Generator) -> None:
    """Gives groups, blocks and rows scales of their own, within a factor of two: what reads another's scale
    is then wrong. A scale packed with a zero point keeps its own. Tensor by tensor along the first
    dimension, so that little memory is needed."""
    for scale in scales:
        if scale is None or scale.dtype == torch.int32:
            continue
        if scale.dtype == torch.uint8:  # E8M0
            scale.add_(
                torch.randint(0, 2, scale.shape, generator=generator, device=scale.device).to(torch.uint8)
            )
            continue
        for part in scale:
            factor = torch.rand(part.shape, generator=generator, device=part.device) + 0.5
            part.copy_((part.float() * factor).to(part.dtype))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; infinite if anything is not a number."""
    if not torch.isfinite(found).all():
        return float("inf")
    difference, norm = (
        torch.linalg.vector_norm(part, dtype=torch.float64) for part in (found - wanted, wanted)
    )
    return float(difference / norm.clamp(min=1e-30))
