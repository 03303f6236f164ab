"""A dense linear layer for many tokens.

    y_t = W · x_t (+ bias) (+ residual_t)

x [tokens, columns]: for FP8 weights float8_e4m3fn with x_scale float32 [tokens] (fp8_tensor, fp8_channel) or
[tokens, columns / 128] (fp8_block), from kernels/quantise_fp8.py, multiplied FP8 by FP8; bf16 for bf16 and
4-bit weights, these rounded to bf16 after their group scale. W in the formats of kernels/_linear.py;
unquantised products are a library's but where slices were measured to be faster. residual [tokens, rows]
bf16, which may be the same memory as y; y [tokens, rows] bf16 or float32. Sums, scales, bias and residual in
float32, one rounding at the end.

A program takes ROWS rows of W and TOKENS tokens: a tile. Programs go through BAND row tiles for each tile of
tokens before they take the next, so that those that run together share rows and tokens in the L2.

With more than one slice a program takes STEPS whole steps of the columns, as in linear_few.py: that is for
tiles that are fewer than multiprocessors. Each writes its sums to `partial` [slices, tokens, rows] float32,
and the last of a tile (a counter says so; it is zero before and after) adds them up, slice by slice: the sum
does not depend on which program ends first.

Source: own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _linear
from firebox.kernels._expert_tiles import row_factors
from firebox.kernels._experts import BLOCK, FP8
from firebox.kernels._linear import Problem, Weights, add_up, finish, step
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels._wgmma import products_done, waits
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "linear"
SUMMED = 32  # sums of a thread that the last program of a tile adds up at a time
SLICES = (2, 3, 4, 6, 8)
FEWEST_STEPS = 4  # of a slice: fewer fill no pipeline
FULL = 0.85  # of a wave of programs, which slices are for
MOST_WAVES = 3  # of programs: more slices than that only write more sums


@dataclass(frozen=True)
class Config:
    """`rows` of weights and `tokens` of a tile, `depth` columns a step, `band`: row tiles that are taken
    together, `slices` of the columns that are wanted (as many come out as whole steps allow)."""

    rows: int = 128
    tokens: int = 128
    depth: int = 128
    warps: int = 8
    stages: int = 3
    band: int = 8
    tma: bool = False
    slices: int = 1


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """As linear_few."""
    return _linear.refuse(problem, gpu)


def quantised(problem: Problem) -> bool:
    """Are activations FP8 too?"""
    return problem.format in FP8


def unquantised(problem: Problem) -> bool:
    """Is there a library for the product as it is?"""
    return problem.format == "bf16"


def x_group(problem: Problem) -> int:
    """Columns of x that share a scale, 0 for all of a token's."""
    return BLOCK if problem.format == "fp8_block" else 0


def division(problem: Problem, config: Config) -> tuple[int, int]:
    """Steps of a slice, and how many slices there are."""
    steps = -(-problem.columns // config.depth)
    of_slice = -(-steps // config.slices)
    return of_slice, -(-steps // of_slice)


def tiles_of(problem: Problem, tokens: int, config: Config) -> int:
    """Of so many tokens."""
    return -(-problem.rows // config.rows) * -(-tokens // config.tokens)


def search_space(problem: Problem, tokens: int, gpu: Gpu) -> Iterator[Config]:
    """Tiles that are worth compiling; whether they fit is the compiler's to say. Of unquantised weights those
    in slices alone: where there are tiles enough, a library's product is as fast."""
    tiles = (
        (64, 64, 4),
        (128, 64, 4),
        (64, 128, 4),
        (128, 128, 4),
        (128, 128, 8),
        (256, 128, 8),
        (128, 256, 8),
    )
    tma = "tma" in gpu.facts
    for rows, wide, warps in tiles:
        if wide > max(64, 2 * tokens):
            continue
        for stages in (3, 4):
            if unquantised(problem):
                for depth in (64, 128):
                    tile = Config(rows, wide, depth, warps, stages, tma=tma)
                    yield from _sliced(problem, tokens, tile, gpu)
                continue
            depth = 128 if problem.group in (0, 128) else 64
            config = Config(rows, wide, depth, warps, stages)
            yield config
            if tma:
                yield replace(config, tma=True)
            if problem.group and depth == 64:
                yield replace(config, depth=128)
            yield from _sliced(problem, tokens, replace(config, tma=tma), gpu)


def _sliced(problem: Problem, tokens: int, config: Config, gpu: Gpu) -> Iterator[Config]:
    """Where the tiles alone would not fill the GPU once: as many slices as fill it, or as there can be."""
    tiles, at_once = tiles_of(problem, tokens, config), max(gpu.sms, 1)
    if tiles >= at_once:
        return
    found = [replace(config, slices=slices) for slices in SLICES if tiles * slices <= MOST_WAVES * at_once]
    found = [sliced for sliced in found if _are_worth_it(problem, sliced)]
    yield from (sliced for sliced in found if sliced == found[-1] or tiles * sliced.slices >= FULL * at_once)


def _are_worth_it(problem: Problem, config: Config) -> bool:
    """All slices come out, each with steps enough."""
    steps, slices = division(problem, config)
    return slices == config.slices and steps >= FEWEST_STEPS


def default(problem: Problem, tokens: int, gpu: Gpu) -> Config:
    """A tile that fits everywhere, for want of a tuned one: large ones where they fill the GPU."""
    depth = max(64, 2 * problem.group if problem.group < 128 else 128)
    if problem.group == 0:
        depth = 64 if unquantised(problem) else 128
    if -(-problem.rows // 128) * -(-tokens // 128) >= max(gpu.sms, 1) and problem.group == 0:
        return Config(128, 128, depth, 8, 3)
    if tokens > 64 and problem.group > 0:
        return Config(64, 128, depth, 4, 2)
    return Config(64, 64, depth, 4, 3)


# ---- 2. the device code


@triton.jit
def linear_tiles(
    x, x_tiles, x_scale, w, tiles, scale, row_scale, bias, residual, partial, out, counters, tokens,
    R: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    DEPTH: tl.constexpr, BAND: tl.constexpr, STEPS: tl.constexpr, SLICES: tl.constexpr, SUMMED: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr,
    STAGES: tl.constexpr, WAITS: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_launch_begin(PDL)
    program = tl.program_id(0)
    row_tiles: tl.constexpr = (R + ROWS - 1) // ROWS
    in_band = tl.cdiv(tokens, TOKENS) * BAND
    first_tile = program // in_band * BAND
    width = tl.minimum(row_tiles - first_tile, BAND)
    n = first_tile + program % in_band % width
    first_token = program % in_band // width * TOKENS
    rows = n * ROWS + tl.arange(0, ROWS)  # of the result
    mine = rows  # of W: those behind the last read the last one
    if R % ROWS != 0:
        mine = tl.minimum(rows, R - 1)
    t = first_token + tl.arange(0, TOKENS)
    live = t < tokens
    scale_of_row = None
    if GROUP > 0:
        scale_of_row = scale + mine[:, None].to(tl.int64) * GROUPS
    elif scale is not None:
        scale_of_row = scale + (mine // 128)[:, None] * (COLUMNS // 128)
    wait_for_launch_before(PDL)
    row_of_x = x + t[:, None].to(tl.int64) * COLUMNS
    scale_of_token = None
    if x_scale is not None:
        scale_of_token = x_scale + t * (COLUMNS // X_GROUP if X_GROUP > 0 else 1)
    begin = 0
    stop = COLUMNS
    if SLICES > 1:
        begin = tl.program_id(1) * (STEPS * DEPTH)
        stop = tl.minimum(begin + STEPS * DEPTH, COLUMNS)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in tl.range(begin, stop, DEPTH, num_stages=STAGES):
        acc = step(
            acc, w, tiles, n * ROWS, mine, scale_of_row, row_of_x, x_tiles, first_token, scale_of_token, live,
            first, COLUMNS, ROWS, DEPTH, FORMAT, DTYPE, GROUP, X_GROUP, ASM, MASKED,
        )  # fmt: skip
        products_done(first, WAITS)
    if row_scale is not None:
        acc *= row_factors(row_scale, mine, FORMAT, ASM)[:, None]
    if x_scale is not None and X_GROUP == 0:
        acc *= tl.load(scale_of_token, mask=live, other=0.0)[None, :]
    bias_of_row = None
    if bias is not None:
        bias_of_row = tl.load(bias + mine)[:, None]
    at = t[None, :].to(tl.int64) * R + rows[:, None]
    stores = live[None, :] & (rows < R)[:, None]
    if SLICES == 1:
        finish(acc, bias_of_row, residual, out, at, stores)
    else:
        tl.store(partial + tokens.to(tl.int64) * tl.program_id(1) * R + at, acc, mask=stores)
        tl.debug_barrier()  # every thread's sums are written before the counter says so
        ended = tl.atomic_add(counters + program, 1, sem="acq_rel")
        if ended == SLICES - 1:
            tl.debug_barrier()
            last = tl.minimum(first_token + TOKENS, tokens)
            add_up(
                partial, bias_of_row, residual, out, tokens, first_token, last, rows, rows < R, R, ROWS,
                SLICES, SUMMED,
            )  # fmt: skip
            tl.store(counters + program, 0)


# ---- 3. the launch


def request(problem: Problem, config: Config, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """One compile for any number of tokens."""
    types, absent = _linear.arguments(problem, config.rows, config.depth, tma=config.tma)
    native = quantised(problem)
    types |= {"x": "*fp8e4nv" if native else f"*{_linear.OUT_TYPES[problem.dtype]}"}
    of_x = {
        "x_scale": "*fp32" if native else "",
        "x_tiles": f"tensordesc<{types['x'][1:]}[{config.tokens}, {config.depth}]>"
        if config.tma and problem.group == 0
        else "",
    }
    types |= {name: type for name, type in of_x.items() if type}
    absent |= {name: None for name, type in of_x.items() if not type}
    steps, slices = division(problem, config)
    types |= {"partial": "*fp32", "counters": "*i32"} if slices > 1 else {}
    absent |= {} if slices > 1 else {"partial": None, "counters": None}
    constants = _linear.constants(problem, gpu, interpreted=interpreted)
    constants |= {
        "DTYPE": None if native else constants["DTYPE"],
        "ROWS": config.rows,
        "TOKENS": config.tokens,
        "DEPTH": config.depth,
        "BAND": config.band,
        "STEPS": steps,
        "SLICES": slices,
        "SUMMED": min(config.tokens, SUMMED * 32 * config.warps // config.rows),
        "X_GROUP": x_group(problem),
        "STAGES": config.stages,
        "WAITS": waits(gpu, decoded=not native and not unquantised(problem), interpreted=interpreted),
        "MASKED": problem.columns % config.depth != 0,
    }
    return CompileRequest(
        linear_tiles,
        types | {"tokens": "i32"},
        absent | constants,
        gpu,
        _linear.aligned(types),
        num_warps=config.warps,
        num_stages=config.stages,
        options={"launch_pdl": True} if constants["PDL"] else {},
        declares=("fp8",) if native else (problem.dtype,),
    )


def scratch(problem: Problem, tokens: int, config: Config) -> tuple[int, int]:
    """How many float32 of partial sums and how many int32 counters a launch needs."""
    slices = division(problem, config)[1]
    if slices == 1:
        return 0, 0
    return slices * tokens * problem.rows, tiles_of(problem, tokens, config)


def run(
    launcher: Launcher,
    problem: Problem,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weights: Weights,
    residual: torch.Tensor | None,
    partial: torch.Tensor,
    out: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Launches `request(...)` for as many tokens as `x` [tokens, columns] has. Writes `out` and, as far as
    `scratch` says, `partial`; `counters` are zero and come back zero. All contiguous."""
    constants, tokens = launcher.request.constexprs, x.shape[0]
    given = _linear.bound(launcher, weights, residual)
    if x_scale is not None:
        given["x_scale"] = x_scale
    if "x_tiles" in launcher.request.signature:
        given["x_tiles"] = _linear.descriptor(x, launcher.request.signature["x_tiles"])
    if constants["SLICES"] > 1:
        given |= {"partial": partial, "counters": counters}
    tiles = -(-problem.rows // constants["ROWS"]) * -(-tokens // constants["TOKENS"])
    launcher((tiles, constants["SLICES"], 1), **given, x=x, out=out, tokens=tokens)


# ---- 4. the reference: _linear.reference; `x` dequantised, if it was quantised
reference = _linear.reference
