"""Adds up each token's experts: out_t = (out_t +) Σ_k y[t · top_k + k], in this order and in float32.

y [tokens · top_k, hidden] bf16, routing weights already in it; out [tokens, hidden] bf16. `ready` [experts]
int32, which told kernels/moe_down_few.py when to begin, is zero afterwards.

Source: own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels._experts import POINTER_NAMES
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "moe_combine"
COLUMNS = 1024  # that one program adds up


@dataclass(frozen=True)
class Problem:
    """`dtype`: of y and out, "bf16" or "f16". `residual`: what `out` holds is part of the sum."""

    hidden: int
    top_k: int
    dtype: str = "bf16"
    residual: bool = False


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs."""
    return None if gpu.kind == "cuda" else "is made for NVIDIA GPUs"


# ---- 2. the device code


@triton.jit
def add_experts(
    y, out, ready, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, RESIDUAL: tl.constexpr,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_launch_begin(PDL)
    wait_for_launch_before(PDL)
    token = tl.program_id(0).to(tl.int64)
    if ready is not None:
        e = tl.arange(0, PADDED)
        mine = tl.where(tl.program_id(0) + tl.program_id(1) == 0, EXPERTS, 0)
        tl.store(ready + e, 0, mask=e < mine)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < HIDDEN
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(TOP_K):
        total += tl.load(y + (token * TOP_K + k) * HIDDEN + column, mask=there, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(out + token * HIDDEN + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * HIDDEN + column, total.to(out.dtype.element_ty), mask=there)


# ---- 3. the launch


def request(problem: Problem, gpu: Gpu, *, experts: int = 0, interpreted: bool = False) -> CompileRequest:
    """One compile for any number of tokens. `experts`: how many have a counter that is to be zero again."""
    pdl = "pdl" in gpu.facts and not interpreted
    signature = dict.fromkeys(("y", "out"), f"*{POINTER_NAMES[problem.dtype]}")
    signature |= {"ready": "*i32"} if experts else {}
    constants: dict[str, Any] = {} if experts else {"ready": None}
    constants |= {"EXPERTS": experts, "PADDED": triton.next_power_of_2(max(experts, 1))}
    constants |= {"HIDDEN": problem.hidden, "TOP_K": problem.top_k, "COLUMNS": COLUMNS, "PDL": pdl}
    constants["RESIDUAL"] = problem.residual
    options = {"launch_pdl": True} if pdl else {}
    return CompileRequest(
        add_experts, signature, constants, gpu, tuple(signature), num_warps=4, options=options
    )


def run(launcher: Launcher, y: torch.Tensor, out: torch.Tensor, ready: torch.Tensor | None = None) -> None:
    """Writes `out` [tokens, hidden], and zeros to `ready` [experts] int32 if the request has it."""
    counters = {}
    if "ready" in launcher.request.signature:
        assert ready is not None, "what was counted is to be zero again"
        counters["ready"] = ready
    launcher((out.shape[0], -(-out.shape[1] // COLUMNS), 1), y=y, out=out, **counters)


# ---- 4. the reference


def reference(problem: Problem, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """out in float32; `out`: what it held."""
    total = y.float().unflatten(0, (-1, problem.top_k)).sum(1)
    return total if out is None else total + out.float()
