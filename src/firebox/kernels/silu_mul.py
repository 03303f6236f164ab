"""The activation of a gated MLP: out = silu(gate) · up, or gpt-oss's clamped form

    gate ← min(gate, limit);  up ← clamp(up, −limit, limit);  out = (up + 1) · gate · sigmoid(alpha · gate)

gate_up [tokens, 2 · inter] bf16, gate first; out [tokens, inter] bf16, and/or q float8_e4m3fn with scales as
kernels/quantise_fp8.py writes them. Float32 inside, rounded to bf16 once (layers/dense.py rounds silu(gate)
too); q is made of the rounded numbers.

Source: own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _rows
from firebox.kernels._experts import POINTER_NAMES
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels._rows import PLAIN, Outputs, tile_columns, write_rows
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "silu_mul"
ACTIVATIONS = ("silu_mul", "clamped_swiglu")
MAX_SHARED = 16_384  # columns that may share a scale: one program's


@dataclass(frozen=True)
class Problem:
    """`inter`: the width of a result. `limit` and `alpha`: of clamped_swiglu. `dtype`: "bf16" or "f16"."""

    inter: int
    activation: str = "silu_mul"
    limit: float = 7.0
    alpha: float = 1.702
    outputs: Outputs = PLAIN
    dtype: str = "bf16"


@dataclass(frozen=True)
class Config:
    """A program takes `columns` of one token: all of them where they share a scale."""

    columns: int
    warps: int


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs; up to 16,384 columns with one scale."""
    if problem.activation not in ACTIVATIONS:
        return f"knows {' and '.join(ACTIVATIONS)}, not {problem.activation}"
    if _whole(problem.outputs) and problem.inter > MAX_SHARED:
        return f"finds one scale for up to {MAX_SHARED} columns, not {problem.inter}"
    return _rows.refuse(problem.inter, problem.outputs, gpu)


def search_space(problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """Tiles with 4 to 32 elements a thread."""
    widest = triton.next_power_of_2(problem.inter)
    for columns in (widest,) if _whole(problem.outputs) else (512, 1024, 2048, 4096):
        for warps in (1, 2, 4, 8, 16):
            if columns <= widest and 4 <= columns // (32 * warps) <= 32:
                yield Config(columns, warps)


def default(problem: Problem, gpu: Gpu) -> Config:
    """1,024 columns, or all; 8 to 32 elements a thread."""
    widest = triton.next_power_of_2(problem.inter)
    columns = widest if _whole(problem.outputs) else min(1024, widest)
    return Config(columns, warps=max(1, min(16, columns // 256)))


def _whole(outputs: Outputs) -> bool:
    """Must one program see all columns?"""
    return outputs.fp8 and not outputs.group


# ---- 2. the device code


@triton.jit
def activate_rows(
    gate_up, out, q, scales, CLAMPED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, LEAST: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program GROUPS · GROUP columns of a token."""
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1, 1), tl.int64)
    first = tl.program_id(1) * (GROUPS * GROUP)
    column = tile_columns(first, GROUPS, GROUP)
    there = column < WIDTH
    at = gate_up + row * (2 * WIDTH) + column
    gate = tl.load(at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=there, other=0.0).to(tl.float32)
    if CLAMPED:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        values = (up + 1.0) * gate * tl.sigmoid(gate * ALPHA)
    else:
        values = gate * tl.sigmoid(gate) * up
    write_rows(values, out, q, scales, row, first, there, WIDTH, GROUPS, GROUP, LEAST, DTYPE)


# ---- 3. the launch


def request(
    problem: Problem, gpu: Gpu, config: Config | None = None, *, interpreted: bool = False
) -> CompileRequest:
    """One compile for any number of tokens. `config`: by default the default."""
    config = config or default(problem, gpu)
    pdl = "pdl" in gpu.facts and not interpreted
    types, absent = _rows.arguments(problem.outputs, problem.dtype)
    types |= {"gate_up": f"*{POINTER_NAMES[problem.dtype]}"}
    constants = _rows.constants(problem.inter, config.columns, problem.outputs, problem.dtype, pdl=pdl)
    clamped = problem.activation == "clamped_swiglu"
    constants |= {"CLAMPED": clamped, "LIMIT": problem.limit, "ALPHA": problem.alpha}
    return CompileRequest(
        activate_rows,
        types,
        absent | constants,
        gpu,
        _rows.pointers(types),
        num_warps=config.warps,
        options={"launch_pdl": True} if pdl else {},
    )


def run(launcher: Launcher, gate_up: torch.Tensor, **outputs: torch.Tensor) -> None:
    """Writes those of `out`, `q` and `scales` that the launch was compiled for, given by name."""
    constants = launcher.request.constexprs
    assert gate_up.is_contiguous() and gate_up.shape[1] == 2 * constants["WIDTH"], gate_up.shape
    programs = -(-constants["WIDTH"] // (constants["GROUPS"] * constants["GROUP"]))
    launcher((gate_up.shape[0], programs, 1), gate_up=gate_up, **outputs)


# ---- 4. the reference


def reference(problem: Problem, gate_up: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the launch writes, by its name, in gate_up's dtype, float32 inside."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    if problem.activation == "silu_mul":
        rows = gate * gate.sigmoid() * up
    else:
        gate, up = gate.clamp(max=problem.limit), up.clamp(-problem.limit, problem.limit)
        rows = (up + 1) * gate * (gate * problem.alpha).sigmoid()
    return _rows.written(problem.outputs, rows.to(gate_up.dtype))


# ---- 5. cases and inputs

CASES = (
    Problem(384),
    Problem(2880, "clamped_swiglu"),
    Problem(1536, "clamped_swiglu", limit=2.0, outputs=Outputs(plain=True, fp8=True)),
    Problem(3072, outputs=Outputs(plain=False, fp8=True)),
    Problem(10_944, outputs=Outputs(plain=True, fp8=True)),
    Problem(1280, outputs=Outputs(plain=False, fp8=True, group=128)),
    Problem(12_288, outputs=Outputs(plain=True, fp8=True, group=128)),
)


def inputs(problem: Problem, rows: int, generator: torch.Generator, **kind: Any) -> dict[str, Any]:
    """gate_up, some of it beyond the limit. `kind`: dtype and device."""
    gate_up = torch.randn(rows, 2 * problem.inter, generator=generator, device=kind["device"]) * 3
    return {"gate_up": gate_up.to(kind["dtype"])}
