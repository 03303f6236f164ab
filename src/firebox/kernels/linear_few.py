"""A dense linear layer for few tokens (1 to 64), which is to say: W, streamed once.

    y_t = W · x_t (+ bias) (+ residual_t)

x [tokens, columns] bf16; W in the formats of kernels/_linear.py; residual [tokens, rows] bf16, which may be
the same memory as y; y [tokens, rows] bf16 or float32. Weight-only: FP8 codes are multiplied as float16,
which holds them exactly, with x as float16 (rounded where it is below 2⁻¹⁴ in size, saturated at ±65,504);
4-bit weights times their group scale are rounded to bf16. Sums, row scales, bias and residual in float32, one
rounding at the end.

    w    columns →   [ head | step | step | … ][ head | step | … ][ …           a slice: one program
    rows ↓                    slice 0                slice 1

A program takes ROWS rows and one slice of the columns. It loads the slice's first HEAD columns into registers
before it waits for the launch before (weights were written long ago), so the memory works while that launch
ends; then a pipeline of STEPS chunks, then the head's product. STEPS 0: the slice is its head. With more than
one slice each program writes its product to `partial` [slices, tokens, rows] float32, and the last of a row
tile (a counter says so; it is zero before and after) adds them up, slice by slice: the sum depends neither on
the batch nor on which program ends first.

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
from firebox.kernels._experts import BLOCK
from firebox.kernels._linear import (
    Problem,
    Weights,
    add_up,
    as_operand,
    columns_of_x,
    finish,
    groups_of,
    step,
    stored,
    words_product,
)
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels._wgmma import products_done, waits
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "linear"
MAX_TOKENS = 64
SUMMED_TOKENS = 8  # tokens whose slices the last program adds up at a time
RESIDENT = 4  # programs of a multiprocessor that the default counts on
FULL = 0.85  # of the last wave of programs, so that the default lets rows alone


@dataclass(frozen=True)
class Config:
    """`rows` of weights of a tile; `head` columns before the wait (0: none); `depth` columns a step; `slices`
    of the columns that are wanted (as many come out as whole steps allow)."""

    rows: int = 64
    head: int = 0
    depth: int = 128
    slices: int = 1
    warps: int = 4
    stages: int = 3
    tma: bool = False


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs; the formats of kernels/_linear.py."""
    return _linear.refuse(problem, gpu)


def padded(tokens: int) -> int:
    """Columns of the product: 8, 16, 32 or 64."""
    return max(8, triton.next_power_of_2(tokens))


def division(problem: Problem, config: Config) -> tuple[int, int]:
    """Steps behind the head of a slice, and how many slices there are."""
    wanted = -(-problem.columns // config.slices)
    steps = -(-max(wanted - config.head, 0) // config.depth)
    return steps, -(-problem.columns // (config.head + steps * config.depth))


def depths(problem: Problem) -> tuple[int, ...]:
    """Columns that a step may have. int4 in groups of 128 loads two scales at a time at least: 4 bytes is the
    least that a pipeline can fetch."""
    if problem.format == "fp8_block":
        return (BLOCK,)
    least = max(64, 2 * problem.group if problem.format == "int4_group" else problem.group)
    return tuple(depth for depth in (64, 128, 256, 512) if least <= depth <= 2 * problem.columns)


def search_space(problem: Problem, tokens: int, gpu: Gpu) -> Iterator[Config]:
    """Tiles that are worth compiling; whether they fit is the compiler's to say."""
    wide = padded(tokens)
    for rows, warps in ((32, 2), (64, 4), (128, 4), (128, 8)):
        yield from _whole_slices(problem, rows, warps, wide)
        for depth in depths(problem):
            chunk_bytes = rows * depth * _linear.weight_bytes(problem)
            if 1024 * (1 + (problem.group == 0)) <= chunk_bytes / warps <= 4096:
                yield from _pipelines(problem, rows, warps, depth, wide, gpu)


def _whole_slices(problem: Problem, rows: int, warps: int, wide: int) -> Iterator[Config]:
    """A slice is its head: up to 16 tokens, because every slice writes a sum for each token."""
    for head in (256, 512, 1024):
        per_thread_bytes = rows * head * _linear.weight_bytes(problem) / (32 * warps)
        if wide <= 16 and 64 <= per_thread_bytes <= 256 and head >= max(depths(problem)[0], BLOCK):
            slices = -(-problem.columns // head)
            yield Config(rows, head, depths(problem)[0], slices, warps, 1)


def _pipelines(problem: Problem, rows: int, warps: int, depth: int, wide: int, gpu: Gpu) -> Iterator[Config]:
    few = wide <= 16  # a head of more would take too many registers
    for slices in sorted({default_slices(problem, rows, depth, gpu, times) for times in (1, 3)}):
        for head, stages in ((depth, 3), (depth, 4), (0, 4)) if few else ((0, 3), (0, 4)):
            chunk_bytes = rows * depth * _linear.weight_bytes(problem) + wide * depth * 2
            if chunk_bytes * (stages - 1) <= gpu.smem_per_block_bytes:
                config = Config(rows, head, depth, slices, warps, stages)
                yield config
                if (
                    "tma" in gpu.facts
                    and depth // _linear.per_word(problem) <= 256
                    and (head, stages) == (0, 4)
                ):
                    yield replace(config, tma=True)


def default_slices(problem: Problem, rows: int, depth: int, gpu: Gpu, times: int = 1) -> int:
    """As few slices as fill the GPU `times` over with whole waves of programs; a slice has four steps at
    least."""
    tiles, at_once = -(-problem.rows // rows), max(gpu.sms, 1) * RESIDENT * times
    most = max(1, problem.columns // (4 * depth))
    for slices in range(1, most + 1):
        waves = tiles * slices / at_once
        if waves >= FULL and waves / -(-tiles * slices // at_once) >= FULL:
            return slices
    return most


def default(problem: Problem, tokens: int, gpu: Gpu) -> Config:
    """A tile that fits everywhere, for want of a tuned one; more rows where each tile reads many tokens
    again."""
    many = padded(tokens) == MAX_TOKENS
    rows, warps = (128, 8) if many else (64, 4)
    most = 64 if many and problem.group else 256 if problem.group else 128
    depth = max([d for d in depths(problem) if d <= most] or depths(problem)[:1])
    head = depth if padded(tokens) <= 16 else 0
    return Config(rows, head, depth, default_slices(problem, rows, depth, gpu), warps, 3)


# ---- 2. the device code


@triton.jit
def _head_product(
    acc, head, wide, minus, of_column, x0, x1, x2, x3, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc + head · xᵀ. `of_column` [HEAD]: the scales of blocks, which go to x, as all rows lie in one row of
    blocks; relative to the largest, so that float16 holds the product."""
    if GROUP > 0:
        acc = words_product(acc, head, wide, minus, x0, x1, x2, x3, FORMAT, DTYPE, ASM)
    else:
        xt = as_operand(x0, DTYPE)
        if of_column is not None:
            largest = tl.maximum(tl.max(tl.abs(of_column), axis=0), 1e-30)
            xt = (xt.to(tl.float32) * (of_column / largest)[None, :]).to(DTYPE)
            acc += tl.dot(head.to(DTYPE), tl.trans(xt)) * largest
        else:
            acc = tl.dot(head.to(DTYPE), tl.trans(xt), acc)
    return acc


@triton.jit
def linear_rows(
    x, w, tiles, scale, row_scale, bias, residual, partial, out, counters, tokens,
    R: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    HEAD: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, SLICES: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    WAITS: tl.constexpr, SUMMED: tl.constexpr, HEAD_MASKED: tl.constexpr, MASKED: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    begin = 0
    if SLICES > 1:
        begin = tl.program_id(1) * (HEAD + STEPS * DEPTH)
    rows = n * ROWS + tl.arange(0, ROWS)  # of the result
    live_rows = rows < R
    mine = rows  # of W: those behind the last read the last one
    if R % ROWS != 0:
        mine = tl.minimum(rows, R - 1)
    scale_of_row = None
    if GROUP > 0:
        scale_of_row = scale + mine[:, None].to(tl.int64) * GROUPS
    elif scale is not None:
        scale_of_row = scale + (mine // 128)[:, None] * (COLUMNS // 128)
    if HEAD > 0:
        PER: tl.constexpr = 4 if GROUP > 0 else 1
        head = stored(w, None, 0, mine, begin, ROWS, COLUMNS, HEAD, PER, HEAD_MASKED)
        wide = None
        minus = None
        of_column = None
        if GROUP > 0:
            wide, minus = groups_of(
                scale_of_row, begin, ROWS, COLUMNS, HEAD, GROUP, FORMAT, DTYPE, ASM, HEAD_MASKED
            )
        elif scale is not None:
            i = begin + tl.arange(0, HEAD)
            row_of_blocks = scale + n * ROWS // 128 * (COLUMNS // 128)
            of_column = tl.load(row_of_blocks + i // 128, mask=i < COLUMNS, other=0.0)
    factor = None
    bias_of_row = None
    if row_scale is not None:
        factor = row_factors(row_scale, mine, FORMAT, ASM)
    if bias is not None:
        bias_of_row = tl.load(bias + mine)[:, None]
    wait_for_launch_before(PDL)
    t = tl.arange(0, TOKENS)
    live = t < tokens
    row_of_x = x + t[:, None].to(tl.int64) * COLUMNS
    if HEAD > 0:  # asked for now, used behind the loop
        x0, x1, x2, x3 = columns_of_x(row_of_x, live, begin, COLUMNS, HEAD, GROUP, HEAD_MASKED)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    if STEPS > 0:
        stop = COLUMNS
        if SLICES > 1:
            stop = tl.minimum(begin + HEAD + STEPS * DEPTH, COLUMNS)
        for first in tl.range(begin + HEAD, stop, DEPTH, num_stages=STAGES):
            acc = step(
                acc, w, tiles, n * ROWS, mine, scale_of_row, row_of_x, None, 0, None, live, first,
                COLUMNS, ROWS, DEPTH, FORMAT, DTYPE, GROUP, 0, ASM, MASKED,
            )  # fmt: skip
            products_done(first, WAITS)
    let_next_launch_begin(PDL)
    if HEAD > 0:
        acc = _head_product(acc, head, wide, minus, of_column, x0, x1, x2, x3, GROUP, FORMAT, DTYPE, ASM)
    if factor is not None:
        acc *= factor[:, None]
    at = t[None, :].to(tl.int64) * R + rows[:, None]
    stores = live[None, :] & live_rows[:, None]
    if SLICES == 1:
        finish(acc, bias_of_row, residual, out, at, stores)
    else:
        of_slice = partial + tokens.to(tl.int64) * tl.program_id(1) * R
        tl.store(of_slice + at, acc, mask=stores)
        tl.debug_barrier()  # every thread's sums are written before the counter says so
        ended = tl.atomic_add(counters + n, 1, sem="acq_rel")
        if ended == SLICES - 1:
            tl.debug_barrier()
            add_up(
                partial, bias_of_row, residual, out, tokens, 0, tokens, rows, live_rows, R, ROWS, SLICES,
                SUMMED,
            )  # fmt: skip
            tl.store(counters + n, 0)


# ---- 3. the launch


def request(
    problem: Problem, tokens: int, config: Config, gpu: Gpu, *, interpreted: bool = False
) -> CompileRequest:
    """The compile of this problem for so many tokens. Token counts of one padding share it."""
    steps, slices = division(problem, config)
    tma = config.tma and steps > 0
    types, absent = _linear.arguments(problem, config.rows, config.depth, tma=tma)
    types |= {"x": f"*{_linear.OUT_TYPES[problem.dtype]}"}
    types |= {"partial": "*fp32", "counters": "*i32"} if slices > 1 else {}
    absent |= {} if slices > 1 else {"partial": None, "counters": None}
    constants = _linear.constants(problem, gpu, interpreted=interpreted)
    last = problem.columns - (slices - 1) * (config.head + steps * config.depth)
    constants |= {
        "ROWS": config.rows,
        "TOKENS": padded(tokens),
        "HEAD": config.head,
        "DEPTH": config.depth,
        "STEPS": steps,
        "SLICES": slices,
        "STAGES": config.stages,
        "WAITS": waits(gpu, decoded=problem.format != problem.dtype, interpreted=interpreted),
        "SUMMED": SUMMED_TOKENS,
        "HEAD_MASKED": last < config.head,
        "MASKED": (last - config.head) % config.depth != 0,
    }
    return CompileRequest(
        kernel=linear_rows,
        signature=types | {"tokens": "i32"},
        constexprs=absent | constants,
        gpu=gpu,
        aligned=_linear.aligned(types),
        num_warps=config.warps,
        num_stages=config.stages,
        options={"launch_pdl": True} if constants["PDL"] else {},
        declares=(_linear.operand(problem),),
    )


def scratch(problem: Problem, tokens: int, config: Config) -> tuple[int, int]:
    """How many float32 of partial sums and how many int32 counters a launch needs."""
    slices = division(problem, config)[1]
    if slices == 1:
        return 0, 0
    return slices * tokens * problem.rows, -(-problem.rows // config.rows)


def run(
    launcher: Launcher,
    problem: Problem,
    x: torch.Tensor,
    weights: Weights,
    residual: torch.Tensor | None,
    partial: torch.Tensor,
    out: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Launches `request(...)` for as many tokens as `x` [tokens, columns] has. Writes `out` and, as far as
    `scratch` says, `partial`; `counters` are zero and come back zero. All contiguous."""
    constants = launcher.request.constexprs
    grid = (-(-problem.rows // constants["ROWS"]), constants["SLICES"], 1)
    given = _linear.bound(launcher, weights, residual)
    if constants["SLICES"] > 1:
        given |= {"partial": partial, "counters": counters}
    launcher(grid, **given, x=x, out=out, tokens=x.shape[0])


# ---- 4. the reference: _linear.reference
reference = _linear.reference
