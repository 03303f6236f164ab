"""The output gate of Qwen3.5's attention: out = y · sigmoid(gate).

y [tokens, heads, head_dim] bf16; gate the same shape, where it lies: `qkv` [tokens, columns] bf16 has for
each head its query, then its gate, from column 0 on. out [tokens, heads · head_dim] bf16, and/or q
float8_e4m3fn with scales as kernels/quantise_fp8.py writes them. Float32 inside, rounded to bf16 once
(layers/attention.py rounds the sigmoid too); q is made of the rounded numbers.

Source: own.
"""

from __future__ import annotations

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

OP = "sigmoid_mul"
MAX_SHARED = 16_384  # columns that may share a scale: one program's
COLUMNS = 1024  # of a program, where they need not be all


@dataclass(frozen=True)
class Problem:
    """`dtype`: of y, "bf16" or "f16"."""

    heads: int
    head_dim: int
    outputs: Outputs = PLAIN
    dtype: str = "bf16"

    @property
    def width(self) -> int:
        """Of a result."""
        return self.heads * self.head_dim


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs; up to 16,384 columns with one scale."""
    if problem.head_dim % _rows.ALIGNED:
        return f"needs head_dim a multiple of {_rows.ALIGNED}, not {problem.head_dim}"
    if problem.outputs.fp8 and not problem.outputs.group and problem.width > MAX_SHARED:
        return f"finds one scale for up to {MAX_SHARED} columns, not {problem.width}"
    return _rows.refuse(problem.width, problem.outputs, gpu)


# ---- 2. the device code


@triton.jit
def gate_rows(
    y, qkv, out, q, scales, qkv_stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, LEAST: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program GROUPS · GROUP columns of a token."""
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1, 1), tl.int64)
    first = tl.program_id(1) * (GROUPS * GROUP)
    column = tile_columns(first, GROUPS, GROUP)
    there = column < WIDTH
    values = tl.load(y + row * WIDTH + column, mask=there, other=0.0).to(tl.float32)
    gate_column = column + (column // HEAD_DIM + 1) * HEAD_DIM  # behind its own head's query and all before
    gate = tl.load(qkv + row * qkv_stride + gate_column, mask=there, other=0.0).to(tl.float32)
    gated = values * tl.sigmoid(gate)
    write_rows(gated, out, q, scales, row, first, there, WIDTH, GROUPS, GROUP, LEAST, DTYPE)


# ---- 3. the launch


def request(problem: Problem, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """One compile for any number of tokens and any stride of qkv."""
    pdl = "pdl" in gpu.facts and not interpreted
    types, absent = _rows.arguments(problem.outputs, problem.dtype)
    types |= dict.fromkeys(("y", "qkv"), f"*{POINTER_NAMES[problem.dtype]}")
    columns = triton.next_power_of_2(problem.width)
    if problem.outputs.group or not problem.outputs.fp8:
        columns = min(columns, COLUMNS)
    constants = _rows.constants(problem.width, columns, problem.outputs, problem.dtype, pdl=pdl)
    return CompileRequest(
        gate_rows,
        types | {"qkv_stride": "i32"},
        absent | constants | {"HEAD_DIM": problem.head_dim},
        gpu,
        (*_rows.pointers(types), "qkv_stride"),
        num_warps=max(1, min(16, columns // 256)),
        options={"launch_pdl": True} if pdl else {},
    )


def run(launcher: Launcher, y: torch.Tensor, qkv: torch.Tensor, **outputs: torch.Tensor) -> None:
    """Writes those of `out`, `q` and `scales` that the launch was compiled for, given by name."""
    constants = launcher.request.constexprs
    assert y.is_contiguous(), y.stride()
    programs = -(-constants["WIDTH"] // (constants["GROUPS"] * constants["GROUP"]))
    launcher((y.shape[0], programs, 1), y=y, qkv=qkv, qkv_stride=_rows.aligned(qkv), **outputs)


# ---- 4. the reference


def reference(problem: Problem, y: torch.Tensor, qkv: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the launch writes, by its name, in y's dtype, float32 inside."""
    gate = qkv[:, : 2 * problem.width].unflatten(-1, (problem.heads, 2, -1))[:, :, 1]
    rows = (y.float() * gate.float().sigmoid()).flatten(1)
    return _rows.written(problem.outputs, rows.to(y.dtype))


# ---- 5. cases and inputs

CASES = (
    Problem(3, 64),
    Problem(32, 256),
    Problem(8, 256, Outputs(plain=True, fp8=True)),
    Problem(24, 128, Outputs(plain=False, fp8=True, group=128)),
)


def inputs(problem: Problem, rows: int, generator: torch.Generator, **kind: Any) -> dict[str, Any]:
    """y, and qkv with the keys and values of one head. `kind`: dtype and device."""
    p, device = problem, kind["device"]
    y = torch.randn(rows, p.heads, p.head_dim, generator=generator, device=device)
    qkv = torch.randn(rows, 2 * p.width + 2 * p.head_dim, generator=generator, device=device) * 2
    return {"y": y.to(kind["dtype"]), "qkv": qkv.to(kind["dtype"])}
