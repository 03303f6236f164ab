"""Puts the columns of activations into the order in which 4-bit weights meet them (formats/layouts.py):

    out[t, i] = x[t, arranged_columns[i]]

x and out [tokens, columns] bf16 or float16, columns a multiple of 64.

Source: own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from firebox.formats.layouts import ARRANGED, arranged_columns
from firebox.hardware.base import Gpu
from firebox.kernels._experts import POINTER_NAMES
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels._sorted import arranged
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "moe_arrange"
COLUMNS = 2048  # that one program moves


@dataclass(frozen=True)
class Problem:
    """`group`: columns that share a scale of the weights. `dtype`: "bf16" or "f16"."""

    columns: int
    group: int
    dtype: str = "bf16"


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs."""
    if gpu.kind != "cuda":
        return "is made for NVIDIA GPUs"
    if problem.columns % ARRANGED:
        return f"needs columns a multiple of {ARRANGED}, not {problem.columns}"
    return None


# ---- 2. the device code


@triton.jit
def arrange_rows(
    x, out, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    row = tl.program_id(0).to(tl.int64) * COLUMNS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < COLUMNS
    tl.store(out + row + arranged(column, GROUP), tl.load(x + row + column, mask=there), mask=there)


# ---- 3. the launch


def request(problem: Problem, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """One compile for any number of tokens."""
    pdl = "pdl" in gpu.facts and not interpreted
    return CompileRequest(
        arrange_rows,
        dict.fromkeys(("x", "out"), f"*{POINTER_NAMES[problem.dtype]}"),
        {"COLUMNS": problem.columns, "BLOCK": COLUMNS, "GROUP": problem.group, "PDL": pdl},
        gpu,
        ("x", "out"),
        num_warps=8,
        options={"launch_pdl": True} if pdl else {},
    )


def run(launcher: Launcher, x: torch.Tensor, out: torch.Tensor) -> None:
    """Writes `out`, of x's shape."""
    launcher((x.shape[0], -(-x.shape[1] // COLUMNS), 1), x=x, out=out)


# ---- 4. the reference


def reference(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    """out."""
    return x[:, arranged_columns(problem.columns, problem.group).to(x.device)]
