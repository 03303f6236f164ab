"""The first half of an expert layer for many tokens, sorted by expert (kernels/moe_sort.py):

    h_i = activation(gate_e · x_t, up_e · x_t)   for the i-th choice in `order`, of token t and expert e

x [tokens, hidden] bf16; for FP8 weights float8_e4m3fn with x_scale float32 [tokens] (fp8_tensor, fp8_channel)
or [tokens, hidden / 128] (fp8_block), from kernels/quantise_fp8.py. h [choices, inter] in the sorted order:
bf16, or float8_e4m3fn with h_scale [choices, inter / columns] float32, one for as many columns as a tile has
(32 to 128), so that the second half multiplies FP8 by FP8. Accumulation and activation in float32. A 4-bit
weight times its group scale is rounded to bf16.

Source: own. Measured: H200, 2026-11-21, docs/log/2026-11-21-gpu-kernels.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _experts
from firebox.kernels._expert_tiles import row_factors, row_of_tile, scales_of_rows
from firebox.kernels._experts import Problem, Weights
from firebox.kernels._pdl import let_next_launch_begin, say_ready, wait_for_launch_before
from firebox.kernels._sorted import (
    NARROW,
    activated,
    add_chunk,
    arranged,
    biased,
    empty_tile,
    in_units,
    rescaled_chunk,
    scaled,
    store_tile,
)
from firebox.kernels._wgmma import products_done, waits
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher
from firebox.kernels.moe_gate_up_few import accepts

__all__ = ["accepts"]

# ---- 1. the problem

OP = "moe_gate_up"
FLIPPED_FROM = 64  # tokens of a tile: wgmma's first operand has 64 rows
# A thread's in tiles of 64 sums a thread of 4-bit weights, by warps of a program: so that three programs of 4
# warps, or two of 8, share a multiprocessor, and one decodes while another multiplies; one of 16 has it alone
REGISTERS = {4: 168, 8: 128, 16: 128}
MOST_OF_4_WARPS = 128 * 64  # sums of a tile; twice as many spill on sm_120 and sm_121 (FP8: 172 bytes)


@dataclass(frozen=True)
class Config:
    """`rows` of weights and `tokens` of a tile, `depth` columns a step. `flip`: tokens are the product's
    first operand (kernels/_sorted.py); `tiles`: of rows, one after the other in a program, which keeps its
    activations for all of them if they are `held` (both in the second half of the layer only). `registers`
    that a thread may have; 0: the assembler says."""

    rows: int
    tokens: int
    depth: int
    warps: int = 4
    stages: int = 3
    tma: bool = False
    flip: bool = False
    tiles: int = 1
    held: bool = False
    registers: int = 0

    @property
    def sums(self) -> int:
        """Of a thread."""
        return self.rows * self.tokens // (32 * self.warps)


def quantised(problem: Problem) -> bool:
    """Are activations FP8 too?"""
    return problem.format in _experts.FP8


def inner_group(problem: Problem) -> int:
    """Columns of h that share a scale: half a tile's rows. 0 where h is not quantised."""
    if not quantised(problem):
        return 0
    return next(group for group in (128, 64, 32, 16) if problem.inter % group == 0)


def x_group(problem: Problem) -> int:
    """Columns of x that share a scale, 0 for all of a token's."""
    return _experts.BLOCK if problem.format == "fp8_block" else 0


def search_space(problem: Problem, tokens: int, gpu: Gpu) -> Iterator[Config]:
    """Tiles of `tokens` choices that are worth compiling."""
    native = quantised(problem)
    for rows in (2 * inner_group(problem),) if native else (64, 128, 256):
        for depth in _experts.pipeline_depths(problem.hidden, problem, remainder=False):
            for warps in warps_of(problem, tokens):
                numbers = rows * tokens / (32 * warps)
                if rows > 2 * problem.inter or not 64 <= depth <= 128 or not 16 <= numbers <= 160:
                    continue
                for stages, flip in itertools.product((2, 3, 4), _flips(problem, rows, tokens)):
                    config = Config(rows, tokens, depth, warps, stages, "tma" in gpu.facts, flip)
                    if stages > 2 or rescaled(config, every_step=x_group(problem) > 0):
                        yield from with_registers(problem, config)


def with_registers(problem: Problem, config: Config) -> Iterator[Config]:
    """A tile, and where there is a choice the same with fewer registers, of either half."""
    yield config
    if problem.group and config.sums == 64 and config.tokens >= FLIPPED_FROM:
        yield replace(config, registers=REGISTERS[config.warps])


def limits(config: Config) -> dict[str, int]:
    """What the compiler is told of a tile's registers."""
    return {"maxnreg": config.registers} if config.registers else {}


def warps_of(problem: Problem, tokens: int) -> tuple[int, ...]:
    """Of a program; fewer than wgmma asks for where decoding 4-bit weights takes longer than products: at its
    power limit a GPU pays for every instruction (gpt-oss, 256 tokens: 5 % less). And 16 for tiles that move
    the least through the L2 (gpt-oss, 4,096 tokens: 7 % less)."""
    if problem.group and tokens < FLIPPED_FROM // 2:
        return (1, 2, 4, 8)
    return (4, 8, 16) if problem.group and tokens > FLIPPED_FROM else (4, 8)


def _flips(problem: Problem, rows: int, tokens: int) -> tuple[bool, ...]:
    """FP8 always with tokens first where they are enough, 4-bit never, bf16 perhaps."""
    if tokens < FLIPPED_FROM or problem.group:
        return (False,)
    return (True,) if quantised(problem) or rows < 256 else (False, True)


def rescaled(config: Config, *, every_step: bool) -> bool:
    """Are a tile's sums in units of each step's scales (kernels/_sorted.py)? If these are applied at
    `every_step` and the tile leaves no registers for a step's products."""
    return every_step and config.flip and config.sums >= 128


def narrow_flip(config: Config, gpu: Gpu) -> bool:
    """Are tokens first in a narrow tile too? Not for wgmma, whose first operand has more rows."""
    return config.flip and "wgmma" not in gpu.facts


def default(problem: Problem, tokens: int, gpu: Gpu) -> Config:
    """A tile that fits everywhere, for want of a tuned one."""
    fitting = (rows for rows in (128, 64, 32, 16) if 2 * problem.inter % rows == 0)
    native = quantised(problem)
    rows = 2 * inner_group(problem) if native else next(fitting)
    depth = max(d for d in _experts.pipeline_depths(problem.hidden, problem, remainder=False) if d <= 128)
    flip = native and tokens >= FLIPPED_FROM
    warps = 4 if rows * tokens <= MOST_OF_4_WARPS else 8
    return Config(rows, tokens, min(depth, 64 if problem.format == "bf16" else 128), warps, 3, flip=flip)


# ---- 2. the device code


@triton.jit
def _tile(
    x, x_scale, w, tiles, scale, row_scale, bias, order, h, h_scale, n, expert, first, count,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUPS: tl.constexpr, STORED: tl.constexpr,
    PANEL: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
    FLIP: tl.constexpr, RESCALED: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, UNIT: tl.constexpr, X_GROUP: tl.constexpr, STAGES: tl.constexpr,
    WAITS: tl.constexpr, CLAMPED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, ASM: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """The n-th ROWS of an expert for `count` choices from the `first` on, of which it takes TOKENS."""
    i = tl.arange(0, TOKENS)
    live = i < count
    token = tl.load(order + first + i, mask=live, other=0) // TOP_K
    e = expert.to(tl.int64)
    RAGGED: tl.constexpr = 2 * INTER % ROWS != 0
    rows = n * ROWS + tl.arange(0, ROWS)
    if RAGGED:
        rows = tl.minimum(rows, 2 * INTER - 1)
    first_row = row_of_tile(expert, n * ROWS, 2 * INTER, STORED, PANEL)
    scale_of_row = None
    up_scale = None
    is_up = tl.arange(0, ROWS) // 8 % 2 == 1
    if GROUP > 0:
        matrix = w + e * (2 * INTER * (STORED // 4))
        scale_of_row = scales_of_rows(scale + e * (2 * INTER * GROUPS), rows, GROUPS, GROUP, UNIT, PANEL)
    else:
        matrix = w + e * (2 * INTER * HIDDEN)
        if scale is not None:
            block = e * (2 * INTER // 128) + n * ROWS // 256
            scale_of_row = scale + block * (HIDDEN // 128)
            up_scale = scale + (block + INTER // 128) * (HIDDEN // 128)
    row_of_x = x + token[:, None].to(tl.int64) * HIDDEN
    scale_of_token = None
    if x_scale is not None:
        scale_of_token = x_scale + token * (HIDDEN // X_GROUP if X_GROUP > 0 else 1)
    acc = empty_tile(ROWS, TOKENS, FLIP)
    if RESCALED:
        token_unit = tl.full((TOKENS,), 1.0, tl.float32)
        unit = 1.0
        up_unit = 1.0
        for column in tl.range(0, STORED, DEPTH, num_stages=STAGES):
            acc, token_unit, unit, up_unit = rescaled_chunk(
                acc, token_unit, unit, up_unit, matrix, tiles, first_row, rows, scale_of_row, up_scale, is_up,
                row_of_x, scale_of_token, live, column, HIDDEN, DEPTH, X_GROUP,
            )  # fmt: skip
        acc = in_units(acc, token_unit, unit, up_unit, is_up, scale is not None)
    else:
        for column in tl.range(0, STORED, DEPTH, num_stages=STAGES):
            acc = add_chunk(
                acc, matrix, tiles, first_row, rows, scale_of_row, up_scale, is_up, row_of_x, scale_of_token,
                live, column,
                2 * INTER, HIDDEN, STORED, ROWS, DEPTH, PANEL, FORMAT, DTYPE, GROUP, UNIT, X_GROUP, ASM, FLIP,
            )  # fmt: skip
            products_done(column, WAITS)
    of_token = None
    if x_scale is not None and X_GROUP == 0:
        of_token = tl.load(scale_of_token, mask=live, other=0.0)
    at = (first + i).to(tl.int64)
    y = _finished(
        acc, row_scale, bias, of_token, e * (2 * INTER) + rows,
        ROWS, TOKENS, FORMAT, CLAMPED, LIMIT, ALPHA, ASM, FLIP,
    )  # fmt: skip
    place = n * (ROWS // 2) + tl.arange(0, ROWS // 2)
    there = place < INTER
    if h_scale is not None:
        largest = tl.maximum(tl.max(tl.abs(y), axis=1 if FLIP else 0) / 448.0, 1e-12)
        tl.store(h_scale + at * (2 * INTER // ROWS) + n, largest, mask=live)
        y = scaled(y, None, 1 / largest, FLIP)
    store_tile(h, y, at * INTER, arranged(place, UNIT), live, there, FLIP, RAGGED, KEEP)


@triton.jit
def gate_up_sorted(
    x, x_scale, w, tiles, scale, row_scale, bias, order, blocks, h, h_scale, ready,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUPS: tl.constexpr, STORED: tl.constexpr,
    PANEL: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, PARTS: tl.constexpr, DEPTH: tl.constexpr,
    FLIP: tl.constexpr, NARROW_FLIP: tl.constexpr, RESCALED: tl.constexpr, FORMAT: tl.constexpr,
    DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, X_GROUP: tl.constexpr, STAGES: tl.constexpr,
    WAITS: tl.constexpr, CLAMPED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, ASM: tl.constexpr,
    KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of choices is PARTS programs' work. An expert's last tile is often nearly empty: with at most
    NARROW choices it is so narrow, or a fifth of the products would be of nothing (gpt-oss, 4,096 tokens, 128
    choices an expert in tiles of 64)."""
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    n = tl.program_id(0)
    part = tl.program_id(1) % PARTS
    entry = blocks + tl.program_id(1) // PARTS * 3
    count = tl.load(entry + 2) - part * TOKENS
    if count <= 0:
        return
    expert = tl.load(entry)
    first = tl.load(entry + 1) + part * TOKENS
    if TOKENS > NARROW and count <= NARROW:
        _tile(
            x, x_scale, w, tiles, scale, row_scale, bias, order, h, h_scale, n, expert, first, count,
            HIDDEN, INTER, GROUPS, STORED, PANEL, TOP_K, ROWS, NARROW, DEPTH, NARROW_FLIP, False, FORMAT,
            DTYPE, GROUP, UNIT, X_GROUP, STAGES, WAITS, CLAMPED, LIMIT, ALPHA, ASM, KEEP,
        )  # fmt: skip
    else:
        _tile(
            x, x_scale, w, tiles, scale, row_scale, bias, order, h, h_scale, n, expert, first, count,
            HIDDEN, INTER, GROUPS, STORED, PANEL, TOP_K, ROWS, TOKENS, DEPTH, FLIP, RESCALED, FORMAT, DTYPE,
            GROUP, UNIT, X_GROUP, STAGES, WAITS, CLAMPED, LIMIT, ALPHA, ASM, KEEP,
        )  # fmt: skip
    if ready is not None:
        say_ready(ready + tl.program_id(1) // PARTS)


@triton.jit
def _finished(
    acc, row_scale, bias, of_token, at, ROWS: tl.constexpr, TOKENS: tl.constexpr, FORMAT: tl.constexpr,
    CLAMPED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, ASM: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Scales, biases, activation."""
    of_row = None
    if row_scale is not None:
        of_row = row_factors(row_scale, at, FORMAT, ASM)
    acc = scaled(acc, of_row, of_token, FLIP)
    if bias is not None:
        acc = biased(acc, tl.load(bias + at), FLIP)
    return activated(acc, ROWS, TOKENS, CLAMPED, LIMIT, ALPHA, FLIP)


# ---- 3. the launch


def request(
    problem: Problem,
    config: Config,
    gpu: Gpu,
    *,
    block: int = 0,
    counted: bool = False,
    interpreted: bool = False,
) -> CompileRequest:
    """One compile for any number of tokens. `block`: choices of a block, a multiple of the tile's tokens (0:
    as many as these). `counted`: a block's programs that are done are counted, for the second half to begin
    with that block."""
    types, absent = _experts.weight_arguments(
        problem, problem.hidden, config.rows, config.depth, tma=config.tma
    )
    native, block = quantised(problem), block or config.tokens
    values = "*fp8e4nv" if native else f"*{_experts.POINTER_NAMES[problem.dtype]}"
    types |= {"x": values, "h": values, "order": "*i32", "blocks": "*i32"}
    scales = ("x_scale", "h_scale")
    types |= dict.fromkeys(scales, "*fp32") if native else {}
    absent |= {} if native else dict.fromkeys(scales)
    if counted:
        types["ready"] = "*i32"
    else:
        absent["ready"] = None
    constants: dict[str, Any] = _experts.weight_constants(
        problem, problem.hidden, gpu, interpreted=interpreted
    )
    constants |= {
        "DTYPE": None if native else constants["DTYPE"],
        "TOP_K": problem.top_k,
        "ROWS": config.rows,
        "TOKENS": config.tokens,
        "PARTS": block // config.tokens,
        "DEPTH": config.depth,
        "FLIP": config.flip,
        "NARROW_FLIP": narrow_flip(config, gpu),
        "RESCALED": rescaled(config, every_step=x_group(problem) > 0),
        "X_GROUP": x_group(problem),
        "STAGES": config.stages,
        "WAITS": waits(gpu, decoded=problem.group > 0, interpreted=interpreted),
        "CLAMPED": problem.activation == "clamped_swiglu",
        "LIMIT": problem.limit,
        "ALPHA": problem.alpha,
        "KEEP": _experts.eviction_sorted(problem, block, problem.inter * (1 if native else 2), gpu),
    }
    return CompileRequest(
        gate_up_sorted,
        types,
        absent | constants,
        gpu,
        tuple(name for name, type in types.items() if type.startswith("*")),
        num_warps=config.warps,
        num_stages=config.stages,
        options=({"launch_pdl": True} if constants["PDL"] else {}) | limits(config),
        declares=("fp8",) if native else (problem.dtype,),
    )


def run(
    launcher: Launcher,
    problem: Problem,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weights: Weights,
    order: torch.Tensor,
    blocks: torch.Tensor,
    h: torch.Tensor,
    h_scale: torch.Tensor | None,
    ready: torch.Tensor | None = None,
) -> None:
    """Writes `h` and, in FP8, `h_scale`; one row of programs for each of `blocks` [n, 3]. `ready` [n] int32,
    zero before, counts the programs of each block that have something to do, if the request is `counted`."""
    arguments = _experts.bound(launcher, weights)
    if x_scale is not None:
        arguments |= {"x_scale": x_scale, "h_scale": h_scale}
    if "ready" in launcher.request.signature:
        assert ready is not None, "programs that are done have nowhere to be counted"
        arguments["ready"] = ready
    sizes = launcher.request.constexprs
    grid = (-(-2 * problem.inter // sizes["ROWS"]), blocks.shape[0] * sizes["PARTS"], 1)
    launcher(grid, **arguments, x=x, order=order, blocks=blocks, h=h)


# ---- 4. the reference


def reference(
    problem: Problem, x: torch.Tensor, weights: Weights, expert_ids: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """h [choices, inter] in float32, in the order of `order`. `x`: dequantised, if it was quantised."""
    from firebox.kernels import moe_gate_up_few

    return moe_gate_up_few.reference(problem, x, weights, expert_ids)[order.long()]
