"""Random linear layers in the layout of the GPU kernels, small or of a real shape. Needs torch and Triton,
nothing of the engine."""

from __future__ import annotations

import torch

from firebox.formats import layouts
from firebox.kernels._experts import BLOCK, FP8, INT4_ZERO
from firebox.kernels._linear import ROW_SCALED, Problem, Weights

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def random_weights(
    problem: Problem, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Weights:
    """About N(0, 1 / columns) after dequantisation; every code occurs."""
    rows, columns, group = problem.rows, problem.columns, problem.group
    size = columns**-0.5

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device) * (high - low) + low

    scale = row_scale = None
    if problem.format in FP8:
        w = (normal(rows, columns) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        if problem.format == "fp8_block":
            scale = uniform(0.5, 1.5, -(-rows // BLOCK), columns // BLOCK) * size / 100
    elif group:
        words = (rows, columns // 4)
        w = torch.randint(-32768, 32768, words, generator=generator, dtype=torch.int16, device=device)
        w = w.view(torch.uint16)
        scale = layouts.pad_groups(_group_scales(problem, generator, device))
    else:
        w = (normal(rows, columns) * size).to(DTYPES[problem.dtype])
    if problem.format in ROW_SCALED:
        row_scale = uniform(0.5, 1.5, rows) * size / 100
    return Weights(w, scale, row_scale, normal(rows) * 0.1 if problem.bias else None)


def _group_scales(problem: Problem, generator: torch.Generator, device: torch.device | str) -> torch.Tensor:
    groups = (problem.rows, problem.columns // problem.group)
    if problem.format == "mxfp4":
        return torch.randint(118, 122, groups, generator=generator, device=device).to(torch.uint8)
    level = 100.0 if problem.format == "nvfp4" else problem.columns**-0.5 / 4
    scales = (torch.rand(groups, generator=generator, device=device) + 0.5) * level
    if problem.format == "nvfp4":
        return scales.to(torch.float8_e4m3fn)
    if problem.format != INT4_ZERO:
        return scales.bfloat16()
    zeros = torch.randint(0, 17, groups, generator=generator, device=device)
    return layouts.pack_zeros(scales, zeros)
