"""Second half of the routed experts for one token: whole rows of all its choices, added up in place.

    out = Σ_k w_k · (W_e · h_k + b_e) (+ out),   e the token's k-th choice

h [top_k, inter] as moe_gate_up_one.py leaves it; W as in kernels/_experts.py, bf16 or FP8; routing_weights
[1, top_k] float32; out [1, hidden] bf16 or float16. Weights, h and sums in float32, one rounding at the end.

A program takes some rows of every choice's matrix. The choices were made two launches before, so it loads all
of these before it waits for h; nothing is added up between programs.

Source: own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _experts, moe_down_few, moe_gate_up_one
from firebox.kernels._experts import BLOCK, Problem, Weights
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "moe_down"
LEAST, MOST = 16, 256  # weights a thread


@dataclass(frozen=True)
class Config:
    """A program takes `rows` rows of every choice."""

    rows: int
    warps: int
    tokens: int = 1


accepts = moe_gate_up_one.accepts


def padded(problem: Problem) -> tuple[int, int]:
    """Choices and columns of a tile."""
    return int(triton.next_power_of_2(problem.top_k)), int(triton.next_power_of_2(problem.inter))


def search_space(problem: Problem, tokens: int, gpu: Gpu) -> Iterator[Config]:
    """Tiles that are worth compiling."""
    choices, columns = padded(problem)
    for rows in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4, 8, 16):
            if LEAST <= rows * choices * columns // (32 * warps) <= MOST and problem.hidden % rows == 0:
                yield Config(rows, warps)


def default(problem: Problem, tokens: int, gpu: Gpu) -> Config:
    """Up to 64 weights a thread."""
    choices, columns = padded(problem)
    rows = next((rows for rows in (8, 4, 2) if rows * choices * columns <= 64 * 128), 1)
    return Config(rows, next((n for n in (4, 8) if rows * choices * columns <= 64 * 32 * n), 16))


# ---- 2. the device code


@triton.jit
def down_one(
    h, w, scale, row_scale, bias, expert_ids, routing_weights, out, HIDDEN: tl.constexpr, INTER: tl.constexpr,
    TOP_K: tl.constexpr, CHOICES: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, CHOICES)
    column = tl.arange(0, COLUMNS)
    there = (k < TOP_K)[None, :, None] & (column < INTER)[None, None, :]
    e = tl.load(expert_ids + k, mask=k < TOP_K, other=0).to(tl.int64)
    share = tl.load(routing_weights + k, mask=k < TOP_K, other=0.0)
    row = e[None, :] * HIDDEN + rows[:, None]  # [ROWS, CHOICES]
    at = w + row[:, :, None] * INTER + column[None, None, :]
    tile = tl.load(at, mask=there, other=0.0, eviction_policy="evict_first")
    real = (k < TOP_K)[None, :]
    factor = 1.0
    added = tl.zeros((ROWS, CHOICES), tl.float32)
    if scale is not None:  # the rows lie in one row of blocks
        BLOCKS: tl.constexpr = COLUMNS // 128
        block = tl.arange(0, BLOCKS)[None, :]
        of_rows = e[:, None] * (HIDDEN // 128) + tl.program_id(0) * ROWS // 128
        of_block = tl.load(
            scale + of_rows * (INTER // 128) + block,
            mask=(k < TOP_K)[:, None] & (block < INTER // 128), other=0.0,
        )  # fmt: skip
    if row_scale is not None:
        factor = tl.load(row_scale + row, mask=real, other=0.0)
    if bias is not None:
        added = tl.load(bias + row, mask=real, other=0.0)
    wait_for_launch_before(PDL)
    inner = tl.load(
        h + k[:, None] * INTER + column[None, :], mask=(k < TOP_K)[:, None] & (column < INTER)[None, :],
        other=0.0,
    ).to(tl.float32)  # fmt: skip
    products = tile.to(tl.float32) * inner[None, :, :]
    if scale is not None:
        by_block = tl.sum(tl.reshape(products, (ROWS, CHOICES, BLOCKS, 128)), axis=3)
        sums = tl.sum(by_block * of_block[None, :, :], axis=2)
    else:
        sums = tl.sum(products, axis=2)
    let_next_launch_begin(PDL)
    total = tl.sum((sums * factor + added) * share[None, :], axis=1)
    if RESIDUAL:
        total += tl.load(out + rows).to(tl.float32)
    tl.store(out + rows, total.to(out.dtype.element_ty))


# ---- 3. the launch


def request(problem: Problem, config: Config, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """The compile of this problem."""
    assert problem.hidden % config.rows == 0 and BLOCK % config.rows == 0, (problem, config)
    types, absent = _experts.weight_arguments(problem, problem.inter, config.rows, 128, tma=False)
    inner = _experts.POINTER_NAMES[_experts.operand(problem)]
    types |= {"h": f"*{inner}", "expert_ids": "*i32", "routing_weights": "*fp32"}
    types |= {"out": f"*{_experts.POINTER_NAMES[problem.dtype]}"}
    pdl = "pdl" in gpu.facts and not interpreted
    choices, columns = padded(problem)
    constants = {
        "HIDDEN": problem.hidden,
        "INTER": problem.inter,
        "TOP_K": problem.top_k,
        "CHOICES": choices,
        "COLUMNS": columns,
        "ROWS": config.rows,
        "RESIDUAL": problem.residual,
        "PDL": pdl,
    }
    return CompileRequest(
        kernel=down_one,
        signature=types,
        constexprs={name: value for name, value in absent.items() if name != "tiles"} | constants,
        gpu=gpu,
        aligned=tuple(name for name, type in types.items() if type.startswith("*")),
        num_warps=config.warps,
        options={"launch_pdl": True} if pdl else {},
    )


def run(
    launcher: Launcher,
    problem: Problem,
    h: torch.Tensor,
    weights: Weights,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Launches `request(...)` for the first top_k rows of `h`; writes `out` [1, hidden], or adds to it."""
    assert out.shape[0] == 1, f"one token, not {out.shape[0]}"
    grid = (problem.hidden // launcher.request.constexprs["ROWS"], 1, 1)
    given = {"expert_ids": expert_ids, "routing_weights": routing_weights}
    launcher(grid, **_experts.bound(launcher, weights), h=h, **given, out=out)


# ---- 4. the reference: that of few tokens
reference = moe_down_few.reference
