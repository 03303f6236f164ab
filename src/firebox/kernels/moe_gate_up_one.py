"""First half of the routed experts for one token: whole rows, no tensor cores.

    h_k = act(gate_e · x + b, up_e · x + b),   e the token's k-th choice

x [1, hidden] bf16 or float16; W as in kernels/_experts.py; h [top_k, inter] in the type that
`_experts.operand` names. Weights, x and sums in float32, h rounded once, saturated where it is float16. With
4-bit weights x must stay below 2²⁰.

A program takes some inner columns of one choice: their gate rows and their up rows, all columns of these in
registers (_whole_rows.py, _whole_words.py). Programs are small and many, so that every multiprocessor has its
share.

Source: own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _experts, _whole_rows, _whole_words, moe_gate_up_few
from firebox.kernels._expert_tiles import gated
from firebox.kernels._experts import BLOCK, Problem, Weights
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels._whole_rows import part_of_rows, part_of_x, part_product
from firebox.kernels._whole_words import columns_of_x, row_of_scales, row_of_words, words_products
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "moe_gate_up"
LEAST, MOST = 16, 256  # weights a thread
HUNGRY_FROM = 64  # weights a thread, from which the assembler may not ask for all of them at once
REGISTERS = (112, 128)  # for these


@dataclass(frozen=True)
class Config:
    """A program takes `rows` inner columns, which is as many gate rows and up rows. `registers` that a thread
    may have; 0: the assembler says. Told that it may have many, it asks for more of a tile at once."""

    rows: int
    warps: int
    tokens: int = 1
    registers: int = 0


C = TypeVar("C", bound=Any)  # the tile of either half
accepts = moe_gate_up_few.accepts


def width(problem: Problem, columns: int) -> int:
    """Columns that a row takes in registers."""
    if problem.group:
        return _whole_words.padded(columns, problem.group)
    return _whole_rows.padded(columns)


def most(problem: Problem) -> int:
    """Weights a thread; of integers, which take the fewest instructions, the most."""
    if problem.format in _experts.INTEGERS:
        return 4 * MOST
    return 2 * MOST if problem.group else MOST


def across(problem: Problem, config: Config) -> int:
    """Rows of 4-bit weights that lie side by side in a program's threads."""
    if not problem.group:
        return 1
    return max(1, 32 * config.warps // _whole_words.threads_of(problem.hidden, problem.group))


def search_space(problem: Problem, tokens: int, gpu: Gpu) -> Iterator[Config]:
    """Tiles that are worth compiling."""
    for rows in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4, 8, 16):
            config = Config(rows, warps)
            each = 2 * rows * width(problem, problem.hidden) // (32 * warps)
            if LEAST <= each <= most(problem) and rows % across(problem, config) == 0:
                yield from with_registers(config, each)


def with_registers(config: C, each: int) -> Iterator[C]:
    """A tile of `each` weights a thread, and the same with registers, of either half."""
    yield config
    for registers in REGISTERS if each >= HUNGRY_FROM else ():
        yield replace(config, registers=registers)


def default(problem: Problem, tokens: int, gpu: Gpu) -> Config:
    """Four warps and up to 64 weights a thread; of longer rows one, or as many as lie side by side."""
    padded = 2 * width(problem, problem.hidden)
    if problem.group:
        return Config(across(problem, Config(1, 4)), 4)
    return Config(next((rows for rows in (8, 4, 2) if rows * padded <= 64 * 128), 1), 4)


# ---- 2. the device code


@triton.jit
def gate_rows(inner):
    """Of an expert; up rows lie 8 behind."""
    return inner // 8 * 16 + inner % 8


@triton.jit
def _of_rows(
    x, w, scale, e, inner, HIDDEN: tl.constexpr, INTER: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    C2: tl.constexpr,
):  # fmt: skip
    """gate · x and up · x, [ROWS] each, of an expert's `inner` columns: bf16 and FP8."""
    row = e * (2 * INTER) + gate_rows(inner)
    at = row * HIDDEN
    up_at = at + 8 * HIDDEN
    g0 = part_of_rows(w, at, 0, C0, HIDDEN)
    u0 = part_of_rows(w, up_at, 0, C0, HIDDEN)
    if C1 > 0:
        g1 = part_of_rows(w, at, C0, C1, HIDDEN)
        u1 = part_of_rows(w, up_at, C0, C1, HIDDEN)
    if C2 > 0:
        g2 = part_of_rows(w, at, C0 + C1, C2, HIDDEN)
        u2 = part_of_rows(w, up_at, C0 + C1, C2, HIDDEN)
    scale_at = None
    up_scale_at = None
    if scale is not None:  # gate blocks stand before up blocks
        of_expert = scale + e * (2 * INTER // 128) * (HIDDEN // 128)
        scale_at = of_expert + inner // 128 * (HIDDEN // 128)
        up_scale_at = of_expert + (INTER + inner) // 128 * (HIDDEN // 128)
    xs = part_of_x(x, 0, C0, HIDDEN)
    gate = part_product(g0, xs, scale_at, 0, HIDDEN)
    up = part_product(u0, xs, up_scale_at, 0, HIDDEN)
    if C1 > 0:
        xs = part_of_x(x, C0, C1, HIDDEN)
        gate += part_product(g1, xs, scale_at, C0, HIDDEN)
        up += part_product(u1, xs, up_scale_at, C0, HIDDEN)
    if C2 > 0:
        xs = part_of_x(x, C0 + C1, C2, HIDDEN)
        gate += part_product(g2, xs, scale_at, C0 + C1, HIDDEN)
        up += part_product(u2, xs, up_scale_at, C0 + C1, HIDDEN)
    return gate, up


@triton.jit
def _activated(
    gate, up, e, choice, inner, row_scale, bias, h, INTER: tl.constexpr, CLAMPED: tl.constexpr,
    LIMIT: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """Writes h of some inner columns, of which `gate` and `up` are the products without the rows' scales."""
    row = e * (2 * INTER) + gate_rows(inner)
    if row_scale is not None:
        gate *= tl.load(row_scale + row)
        up *= tl.load(row_scale + row + 8)
    if bias is not None:
        gate += tl.load(bias + row)
        up += tl.load(bias + row + 8)
    y = gated(gate, up, CLAMPED, LIMIT, ALPHA)
    if h.dtype.element_ty == tl.float16:
        y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
    tl.store(h + choice * INTER + inner, y.to(h.dtype.element_ty))


@triton.jit
def gate_up_one(
    x, w, scale, row_scale, bias, expert_ids, h, HIDDEN: tl.constexpr, INTER: tl.constexpr,
    GROUPS: tl.constexpr, STORED: tl.constexpr, PANEL: tl.constexpr, FORMAT: tl.constexpr,
    DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, C0: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr, ACROSS: tl.constexpr, CHUNK: tl.constexpr, CLAMPED: tl.constexpr,
    LIMIT: tl.constexpr, ALPHA: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    e = tl.load(expert_ids + choice).to(tl.int64)
    if GROUP > 0:  # tiles are ACROSS gate rows, and as many up rows, below each other
        ALL: tl.constexpr = 2 * INTER
        of_expert = w + e * (ALL * (STORED // 4))
        scales = scale + e * (ALL * GROUPS)
        words = ()
        stored = ()
        across = tl.arange(0, ACROSS)
        for a in tl.static_range(ROWS // ACROSS):
            row = gate_rows(first + a * ACROSS + across)[:, None]
            words = words + row_of_words(of_expert, row, HIDDEN, CHUNK, ALL, STORED, PANEL)
            words = words + row_of_words(of_expert, row + 8, HIDDEN, CHUNK, ALL, STORED, PANEL)
            stored = stored + row_of_scales(
                scales, row, HIDDEN, CHUNK, ALL, STORED, GROUPS, GROUP, UNIT, PANEL
            )
            stored = stored + row_of_scales(
                scales, row + 8, HIDDEN, CHUNK, ALL, STORED, GROUPS, GROUP, UNIT, PANEL
            )
        xs = columns_of_x(x + across[:, None] * 0, HIDDEN, CHUNK, UNIT, FORMAT, ASM)
        sums = words_products(words, stored, xs, 2 * ROWS // ACROSS, HIDDEN, CHUNK, GROUP, UNIT, FORMAT)
        for a in tl.static_range(ROWS // ACROSS):
            inner = first + a * ACROSS + across
            _activated(
                sums[2 * a], sums[2 * a + 1], e, choice, inner, row_scale, bias, h, INTER, CLAMPED, LIMIT,
                ALPHA,
            )  # fmt: skip
    else:
        inner = first + tl.arange(0, ROWS)
        gate, up = _of_rows(x, w, scale, e, inner, HIDDEN, INTER, C0, C1, C2)
        _activated(gate, up, e, choice, inner, row_scale, bias, h, INTER, CLAMPED, LIMIT, ALPHA)


# ---- 3. the launch


def request(problem: Problem, config: Config, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """The compile of this problem."""
    assert problem.inter % config.rows == 0 and BLOCK % config.rows == 0, (problem, config)
    types, absent = _experts.weight_arguments(problem, problem.hidden, config.rows, 128, tma=False)
    inner = _experts.POINTER_NAMES[_experts.operand(problem)]
    types |= {"x": f"*{_experts.POINTER_NAMES[problem.dtype]}", "expert_ids": "*i32", "h": f"*{inner}"}
    constants = _experts.weight_constants(problem, problem.hidden, gpu, interpreted=interpreted)
    constants |= {
        "ROWS": config.rows,
        "ACROSS": across(problem, config),
        "CHUNK": _whole_words.chunk_of(problem.hidden, problem.group) if problem.group else 0,
        "CLAMPED": problem.activation == "clamped_swiglu",
        "LIMIT": problem.limit,
        "ALPHA": problem.alpha,
    }
    return CompileRequest(
        kernel=gate_up_one,
        signature=types,
        constexprs={name: value for name, value in absent.items() if name != "tiles"}
        | constants
        | _whole_rows.parts(problem.hidden),
        gpu=gpu,
        aligned=tuple(name for name, type in types.items() if type.startswith("*")),
        num_warps=config.warps,
        options=({"launch_pdl": True} if constants["PDL"] else {})
        | ({"maxnreg": config.registers} if config.registers else {}),
    )


def run(
    launcher: Launcher,
    problem: Problem,
    x: torch.Tensor,
    weights: Weights,
    expert_ids: torch.Tensor,
    h: torch.Tensor,
) -> None:
    """Launches `request(...)` for `x` [1, hidden]; writes the first top_k rows of `h`."""
    assert x.shape[0] == 1, f"one token, not {x.shape[0]}"
    grid = (problem.inter // launcher.request.constexprs["ROWS"], problem.top_k, 1)
    launcher(grid, **_experts.bound(launcher, weights), x=x, expert_ids=expert_ids, h=h)


# ---- 4. the reference: that of few tokens
reference = moe_gate_up_few.reference
