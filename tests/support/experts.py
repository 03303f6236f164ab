"""Random expert layers in the layout of the GPU kernels, small or of a real shape. Needs torch and Triton,
nothing of the engine."""

from __future__ import annotations

import torch

from firebox.formats import layouts
from firebox.kernels._experts import (
    BLOCK,
    FOUR_BIT,
    FP8,
    INT4_ZERO,
    MXFP4,
    ROW_SCALED,
    Problem,
    Weights,
    word_bits,
)

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
WIDE = ("bf16", "fp8_channel", "mxfp4")  # tried without sorting where experts have tokens for several tiles


def random_weights(
    problem: Problem, rows: int, columns: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Weights:
    """The weights of one matrix of all experts, about N(0, 1 / columns) after dequantisation; every code
    occurs."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device) * (high - low) + low

    experts, size, group = problem.experts, columns**-0.5, problem.group
    bias = normal(experts, rows) * 0.1 if problem.biases else None
    scale = row_scale = None
    if problem.format in FP8:
        w = torch.empty(experts, rows, columns, dtype=torch.float8_e4m3fn, device=device)
        for matrix in w:
            matrix.copy_((normal(rows, columns) * 100).clamp(-448, 448))
        if problem.format == "fp8_block":
            scale = uniform(0.5, 1.5, experts, rows // BLOCK, columns // BLOCK) * size / 100
    elif problem.format in FOUR_BIT:
        stored = layouts.whole_units(columns, problem.unit)
        shape = (experts, rows, stored // 4)
        bits = layouts.bits_of_columns(columns, problem.unit, word_bits(problem.format)).view(torch.int16)
        w = torch.randint(-32768, 32768, shape, generator=generator, dtype=torch.int16, device=device)
        w = (w & bits.to(device)).view(torch.uint16)
        groups = (experts, rows, columns // group)
        if problem.format in MXFP4:
            stored = torch.randint(118, 122, groups, generator=generator, device=device).to(torch.uint8)
        elif problem.format == INT4_ZERO:
            zeros = torch.randint(0, 17, groups, generator=generator, device=device)
            stored = layouts.pack_zeros(uniform(0.5, 1.5, *groups) * size / 6, zeros.float())
        else:
            kind = torch.bfloat16 if problem.format == "int4_group" else torch.float8_e4m3fn
            level = size / 4 if problem.format == "int4_group" else 100.0
            stored = (uniform(0.5, 1.5, *groups) * level).to(kind)
        scale = (
            layouts.pad_groups(stored.view(torch.uint8)).view(stored.dtype)
            if stored.itemsize == 1
            else layouts.pad_groups(stored)
        )
    else:
        w = torch.empty(experts, rows, columns, dtype=DTYPES[problem.dtype], device=device)
        for matrix in w:
            matrix.copy_(normal(rows, columns) * size)
    if (panel := problem.panel(columns)) and scale is not None:
        w = layouts.to_panels(w.view(torch.uint8), panel // 2).view(torch.uint16)
        scale_bytes = scale.view(torch.uint8)[..., : columns // group * scale.itemsize]
        scale = layouts.to_panels(scale_bytes, panel // group * scale.itemsize).view(scale.dtype)
    if problem.format in ROW_SCALED:
        row_scale = uniform(0.5, 1.5, experts, rows) * size / 100
    return Weights(w, scale, row_scale, bias)


def random_routing(
    problem: Problem, tokens: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`expert_ids` [tokens, top_k] int32, distinct and uniform, and `routing_weights` that sum to 1."""
    scores = torch.rand(tokens, problem.experts, generator=generator, device=device)
    expert_ids = scores.topk(problem.top_k, dim=1).indices.to(torch.int32)
    weights = torch.rand(tokens, problem.top_k, generator=generator, device=device) + 0.1
    return expert_ids, weights / weights.sum(1, keepdim=True)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; infinite if anything is not a number."""
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))
