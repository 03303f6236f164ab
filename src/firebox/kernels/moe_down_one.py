"""Second half of the routed experts for one token: whole rows of all its choices, added up in place.

    out = Σ_k w_k · (W_e · h_k + b_e) (+ out),   e the token's k-th choice

h [top_k, inter] as moe_gate_up_one.py leaves it; W as in kernels/_experts.py; routing_weights
[1, top_k] float32; out [1, hidden] bf16 or float16. Weights, h and sums in float32, one rounding at the end.
With 4-bit weights h must stay below 2²⁰.

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
from firebox.kernels import _experts, _whole_words, moe_down_few, moe_gate_up_one
from firebox.kernels._experts import BLOCK, Problem, Weights
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels._whole_words import columns_of_x, row_of_scales, row_of_words, words_products
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "moe_down"


@dataclass(frozen=True)
class Config:
    """A program takes `rows` rows of every choice; `registers` as in moe_gate_up_one."""

    rows: int
    warps: int
    tokens: int = 1
    registers: int = 0


accepts = moe_gate_up_one.accepts


def choices(problem: Problem) -> tuple[int, int]:
    """Choices of a program's two tiles; 4-bit weights have one."""
    if problem.group:
        return int(triton.next_power_of_2(problem.top_k)), 0
    first = 1 << (problem.top_k.bit_length() - 1)
    left = problem.top_k - first
    return first, int(triton.next_power_of_2(left)) if left else 0


def padded(problem: Problem) -> tuple[int, int]:
    """Choices and columns that a program holds."""
    inter = problem.inter
    columns = _whole_words.padded(inter, problem.group) if problem.group else triton.next_power_of_2(inter)
    return sum(choices(problem)), int(columns)


def search_space(problem: Problem, tokens: int, gpu: Gpu) -> Iterator[Config]:
    """Tiles that are worth compiling."""
    together, columns = padded(problem)
    for rows in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4, 8, 16):
            each = rows * together * columns // (32 * warps)
            if moe_gate_up_one.LEAST <= each <= moe_gate_up_one.most(problem) and problem.hidden % rows == 0:
                yield from moe_gate_up_one.with_registers(Config(rows, warps), each)


def default(problem: Problem, tokens: int, gpu: Gpu) -> Config:
    """Up to 64 weights a thread."""
    together, columns = padded(problem)
    rows = next((rows for rows in (8, 4, 2) if rows * together * columns <= 64 * 128), 1)
    return Config(rows, next((n for n in (4, 8) if rows * together * columns <= 64 * 32 * n), 16))


# ---- 2. the device code


@triton.jit
def _rows_of_choices(
    w, scale, row_scale, bias, expert_ids, routing_weights, rows, FIRST: tl.constexpr, CHOICES: tl.constexpr,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of the choices FIRST … FIRST + CHOICES, bf16 or FP8: weights [ROWS, CHOICES, COLUMNS], scales of their
    blocks [CHOICES, BLOCKS] (without blocks the routing weights), and [ROWS, CHOICES] what multiplies
    products and what is added to them in the end."""
    k = FIRST + tl.arange(0, CHOICES)
    column = tl.arange(0, COLUMNS)
    there = (k < TOP_K)[None, :, None] & (column < INTER)[None, None, :]
    e = tl.load(expert_ids + k, mask=k < TOP_K, other=0).to(tl.int64)
    share = tl.load(routing_weights + k, mask=k < TOP_K, other=0.0)
    row = e[None, :] * HIDDEN + rows[:, None]
    at = w + row[:, :, None] * INTER + column[None, None, :]
    tile = tl.load(at, mask=there, other=0.0, eviction_policy="evict_first")
    of_block = share
    if scale is not None:  # the rows lie in one row of blocks
        block = tl.arange(0, COLUMNS // 128)[None, :]
        of_rows = e[:, None] * (HIDDEN // 128) + tl.program_id(0) * ROWS // 128
        of_block = tl.load(
            scale + of_rows * (INTER // 128) + block,
            mask=(k < TOP_K)[:, None] & (block < INTER // 128), other=0.0,
        )  # fmt: skip
    factor = tl.broadcast_to(share[None, :], (ROWS, CHOICES))
    added = tl.zeros((ROWS, CHOICES), tl.float32)
    if row_scale is not None:
        factor *= tl.load(row_scale + row)
    if bias is not None:
        added += tl.load(bias + row) * share[None, :]
    return tile, of_block, factor, added


@triton.jit
def _sum_of_choices(
    tile, of_block, factor, added, h, FIRST: tl.constexpr, INTER: tl.constexpr, TOP_K: tl.constexpr,
    BLOCKED: tl.constexpr,
):  # fmt: skip
    """Σ_k w_k · (W_e · h_k + b_e), [ROWS], of what `_rows_of_choices` loaded."""
    ROWS: tl.constexpr = tile.shape[0]
    CHOICES: tl.constexpr = tile.shape[1]
    COLUMNS: tl.constexpr = tile.shape[2]
    k = FIRST + tl.arange(0, CHOICES)
    column = tl.arange(0, COLUMNS)
    inner = tl.load(
        h + k[:, None] * INTER + column[None, :], mask=(k < TOP_K)[:, None] & (column < INTER)[None, :],
        other=0.0,
    ).to(tl.float32)  # fmt: skip
    products = tile.to(tl.float32) * inner[None, :, :]
    if BLOCKED:
        by_block = tl.sum(tl.reshape(products, (ROWS, CHOICES, COLUMNS // 128, 128)), axis=3)
        sums = tl.sum(by_block * of_block[None, :, :], axis=2)
    else:
        sums = tl.sum(products, axis=2)
    return tl.sum(sums * factor + added, axis=1)


@triton.jit
def _by_rows(
    h, w, scale, row_scale, bias, expert_ids, routing_weights, out, HIDDEN: tl.constexpr, INTER: tl.constexpr,
    TOP_K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """bf16 and FP8. Choices are taken in two powers of two, such as 8 and 2."""
    BLOCKED: tl.constexpr = scale is not None
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile, of_block, factor, added = _rows_of_choices(
        w,
        scale,
        row_scale,
        bias,
        expert_ids,
        routing_weights,
        rows,
        0,
        K0,
        HIDDEN,
        INTER,
        TOP_K,
        COLUMNS,
        ROWS,
    )
    if K1 > 0:
        tile1, of_block1, factor1, added1 = _rows_of_choices(
            w, scale, row_scale, bias, expert_ids, routing_weights, rows, K0, K1, HIDDEN, INTER, TOP_K,
            COLUMNS, ROWS,
        )  # fmt: skip
    wait_for_launch_before(PDL)
    total = _sum_of_choices(tile, of_block, factor, added, h, 0, INTER, TOP_K, BLOCKED)
    if K1 > 0:
        total += _sum_of_choices(tile1, of_block1, factor1, added1, h, K0, INTER, TOP_K, BLOCKED)
    let_next_launch_begin(PDL)
    if RESIDUAL:
        total += tl.load(out + rows).to(tl.float32)
    tl.store(out + rows, total.to(out.dtype.element_ty))


@triton.jit
def _by_words(
    h, w, scale, row_scale, bias, expert_ids, routing_weights, out, HIDDEN: tl.constexpr, INTER: tl.constexpr,
    TOP_K: tl.constexpr, CHOICES: tl.constexpr, CHUNK: tl.constexpr, STORED: tl.constexpr,
    GROUPS: tl.constexpr, PANEL: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, FORMAT: tl.constexpr,
    ROWS: tl.constexpr, RESIDUAL: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """4-bit weights. A tile is one row of every choice's matrix; what is no choice has expert 0's weights and
    no share."""
    first = tl.program_id(0) * ROWS
    k = tl.arange(0, CHOICES)
    e = tl.load(expert_ids + k, mask=k < TOP_K, other=0).to(tl.int64)
    share = tl.load(routing_weights + k, mask=k < TOP_K, other=0.0)
    of_expert = w + e[:, None] * (HIDDEN * (STORED // 4))
    scales = scale + e[:, None] * (HIDDEN * GROUPS)
    words = ()
    stored = ()
    factors = ()
    added = ()
    for a in tl.static_range(ROWS):
        words = words + row_of_words(of_expert, first + a, INTER, CHUNK, HIDDEN, STORED, PANEL)
        stored = stored + row_of_scales(
            scales, first + a, INTER, CHUNK, HIDDEN, STORED, GROUPS, GROUP, UNIT, PANEL
        )
        row = e * HIDDEN + first + a
        if row_scale is not None:
            factors = factors + (share * tl.load(row_scale + row),)
        else:
            factors = factors + (share,)
        if bias is not None:
            added = added + (tl.sum(share * tl.load(bias + row)),)
        else:
            added = added + (0.0,)
    wait_for_launch_before(PDL)
    hs = columns_of_x(
        h + tl.minimum(k, TOP_K - 1)[:, None] * INTER, INTER, CHUNK, UNIT, FORMAT, ASM
    )  # fmt: skip
    sums = words_products(words, stored, hs, ROWS, INTER, CHUNK, GROUP, UNIT, FORMAT)
    totals = ()
    for a in tl.static_range(ROWS):
        totals = totals + (tl.sum(sums[a] * factors[a]) + added[a],)
    let_next_launch_begin(PDL)
    for a in tl.static_range(ROWS):
        total = totals[a]
        if RESIDUAL:
            total += tl.load(out + first + a).to(tl.float32)
        tl.store(out + first + a, total.to(out.dtype.element_ty))


@triton.jit
def down_one(
    h, w, scale, row_scale, bias, expert_ids, routing_weights, out, HIDDEN: tl.constexpr, INTER: tl.constexpr,
    GROUPS: tl.constexpr, STORED: tl.constexpr, PANEL: tl.constexpr, FORMAT: tl.constexpr,
    DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if GROUP > 0:
        _by_words(
            h, w, scale, row_scale, bias, expert_ids, routing_weights, out, HIDDEN, INTER, TOP_K, CHOICES,
            CHUNK, STORED, GROUPS, PANEL, GROUP, UNIT, FORMAT, ROWS, RESIDUAL, ASM, PDL,
        )  # fmt: skip
    else:
        _by_rows(
            h, w, scale, row_scale, bias, expert_ids, routing_weights, out, HIDDEN, INTER, TOP_K, K0, K1,
            COLUMNS, ROWS, RESIDUAL, PDL,
        )  # fmt: skip


# ---- 3. the launch


def request(problem: Problem, config: Config, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """The compile of this problem."""
    assert problem.hidden % config.rows == 0 and BLOCK % config.rows == 0, (problem, config)
    types, absent = _experts.weight_arguments(problem, problem.inter, config.rows, 128, tma=False)
    inner = _experts.POINTER_NAMES[_experts.operand(problem)]
    types |= {"h": f"*{inner}", "expert_ids": "*i32", "routing_weights": "*fp32"}
    types |= {"out": f"*{_experts.POINTER_NAMES[problem.dtype]}"}
    together, columns = padded(problem)
    chunk = _whole_words.chunk_of(problem.inter, problem.group) if problem.group else 0
    constants = _experts.weight_constants(problem, problem.inter, gpu, interpreted=interpreted)
    constants |= {
        "TOP_K": problem.top_k,
        "CHOICES": together,
        "K0": choices(problem)[0],
        "K1": choices(problem)[1],
        "COLUMNS": columns,
        "CHUNK": chunk,
        "ROWS": config.rows,
        "RESIDUAL": problem.residual,
    }
    return CompileRequest(
        kernel=down_one,
        signature=types,
        constexprs={name: value for name, value in absent.items() if name != "tiles"} | constants,
        gpu=gpu,
        aligned=tuple(name for name, type in types.items() if type.startswith("*")),
        num_warps=config.warps,
        options=({"launch_pdl": True} if constants["PDL"] else {})
        | ({"maxnreg": config.registers} if config.registers else {}),
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
