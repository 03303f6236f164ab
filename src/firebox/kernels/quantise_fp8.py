"""Rounds activations to FP8 (E4M3) with a scale for each token, or for each 128 columns of a token:

    scale = max |x| / 448;  q = round(x / scale)

x [tokens, columns] bf16 or float16; q the same shape, float8_e4m3fn; scales float32 [tokens] or [tokens,
columns / 128]. Division and maximum in float32; a token of zeros gets the scale 10⁻¹².

Source: own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels._experts import POINTER_NAMES
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "quantise_fp8"
LARGEST = 448.0
LEAST_SCALE = 1e-12


@dataclass(frozen=True)
class Problem:
    """`group`: columns that share a scale; 0: all of a token's. `dtype`: of x, "bf16" or "f16"."""

    columns: int
    group: int
    dtype: str = "bf16"


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs with the type."""
    if gpu.kind != "cuda" or "fp8" not in gpu.facts:
        return f"has no FP8 type on {gpu.name}"
    if problem.group and problem.columns % problem.group:
        return f"needs columns a multiple of {problem.group}, not {problem.columns}"
    return None


# ---- 2. the device code


@triton.jit
def quantise_rows(
    x, q, scales, COLUMNS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, LEAST: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    """One program a token; GROUP columns to a scale."""
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, PADDED // GROUP)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = column < COLUMNS
    values = tl.load(x + token * COLUMNS + column, mask=there, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), axis=1) / 448.0, LEAST)
    tl.store(q + token * COLUMNS + column, (values / scale[:, None]).to(tl.float8e4nv), mask=there)
    tl.store(scales + token * tl.cdiv(COLUMNS, GROUP) + group, scale, mask=group * GROUP < COLUMNS)


# ---- 3. the launch


def request(problem: Problem, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """One compile for any number of tokens."""
    pdl = "pdl" in gpu.facts and not interpreted
    padded = triton.next_power_of_2(problem.columns)
    signature = {"x": f"*{POINTER_NAMES[problem.dtype]}", "q": "*fp8e4nv", "scales": "*fp32"}
    constants = {"COLUMNS": problem.columns, "PADDED": padded, "GROUP": problem.group or padded}
    return CompileRequest(
        quantise_rows,
        signature,
        constants | {"LEAST": LEAST_SCALE, "PDL": pdl},
        gpu,
        tuple(signature),
        num_warps=4,
        options={"launch_pdl": True} if pdl else {},
    )


def run(launcher: Launcher, x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor) -> None:
    """Writes `q` and `scales` for all rows of `x`."""
    launcher((x.shape[0], 1, 1), x=x, q=q, scales=scales)


# ---- 4. the reference


def reference(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q as float8_e4m3fn and the scales."""
    groups = x.float().unflatten(-1, (-1, problem.group or problem.columns))
    scales = (groups.abs().amax(-1) / LARGEST).clamp(min=LEAST_SCALE)
    q = (groups / scales.unsqueeze(-1)).flatten(-2).to(torch.float8_e4m3fn)
    return q, scales if problem.group else scales.squeeze(-1)
