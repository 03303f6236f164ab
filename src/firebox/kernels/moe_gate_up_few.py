"""The first half of an expert layer for few tokens (1 to 128), without sorting them: for every token t and
every expert e it chose, with p the place of that choice in `expert_ids`,

    h_p = activation(gate_e · x_t, up_e · x_t)

x [tokens, hidden] bf16; expert_ids [tokens, top_k] int32; weights as in kernels/_experts.py, gate_up; h
[tokens · top_k, inter] bf16, float16 for FP8 weights. Accumulation in float32, activation in float32. FP8
weights are multiplied as float16, which holds them exactly, with x as float16 (rounded where it is below 2⁻¹⁴
in size; infinite from 65,520 on, so x must come from an RMS norm with a gain below 65,504 / √hidden); h
saturates at ±65,504. Others are multiplied as bf16; a 4-bit weight times its group scale is rounded to bf16.
In tiles of fewer than 8 tokens (_expert_tiles.py, SPREAD), and in any of MXFP4 in units, the scale comes last
and is not rounded; x and h must then stay below 2²⁸ in MXFP4 and NVFP4.

A program takes ROWS interleaved rows of one expert and TOKENS that chose it: the one of every TOKENS-th of
its choices does the work and the others end (MODE "pairs"), or there is one for every expert (MODE
"experts"). Up to 8 tokens are columns of the product as they stand ("columns"; "one" for a single token), or
passes of those that chose the expert where a tile has fewer; with more, those that chose the expert are moved
together, and `table` [choices or experts, 1 + tokens padded] int32 keeps how many and which for the second
half. An expert that more chose than TOKENS takes a pass for each so many; a wider second pass would cost
every program registers. Passes of an expert are programs side by side, which read its weights together: in
"columns" and "pairs" always, in "experts" those of the last one, which may be every token's (a shared
expert); the others' come one after the other.

Source: own. Measured: H200, 2026-11-21, docs/log/2026-11-21-gpu-kernels.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _experts
from firebox.kernels._expert_tiles import (
    activation,
    block_of_row,
    row_factors,
    row_of_tile,
    scales_of_rows,
    spread,
    tile,
)
from firebox.kernels._experts import Problem, Weights
from firebox.kernels._pdl import let_next_launch_begin, say_ready, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "moe_gate_up"
MAX_TOKENS = 128
COLUMNS_UP_TO = 8  # tokens that stand in the product as they are, and the columns of the least product
SPREAD_COLUMNS = (8, 16)  # of the product, tokens times groups
MOST_SPREAD = 4  # tokens of an expert; of more, each pass would decode the weights again


@dataclass(frozen=True)
class Config:
    """`rows` of weights and `tokens` of a tile, `depth` columns a step."""

    rows: int = 64
    tokens: int = 8
    depth: int = 128
    warps: int = 4
    stages: int = 3
    tma: bool = False


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs; the formats of kernels/_experts.py."""
    if gpu.kind != "cuda":
        return "is made for NVIDIA GPUs"
    if problem.format in _experts.FP8 and "fp8" not in gpu.facts:
        return f"has no FP8 type on {gpu.name}"
    return _experts.refuse(problem)


def mode(problem: Problem, tokens: int) -> str:
    """How programs find their tokens; a launch is compiled for one."""
    if tokens <= COLUMNS_UP_TO:
        return "one" if tokens == 1 else "columns"
    return "pairs" if tokens * problem.top_k < problem.experts else "experts"


def padded(tokens: int) -> int:
    """The width of what a program looks through: a power of two, at least 8."""
    return max(COLUMNS_UP_TO, triton.next_power_of_2(tokens))


def programs(problem: Problem, tokens: int) -> int:
    """Programs along the choices or the experts."""
    return problem.experts if mode(problem, tokens) == "experts" else tokens * problem.top_k


def launched(problem: Problem, tokens: int, width: int) -> int:
    """The same and those of the last expert's later passes, each for `width` tokens."""
    later = -(-tokens // width) - 1 if mode(problem, tokens) == "experts" else 0
    return programs(problem, tokens) + later


def spread_groups(problem: Problem, tokens: int, depth: int) -> int:
    """How many groups of a step of `depth` columns have columns of their own in a tile of so few tokens, as
    many as make 8 columns at least; 0: they have none (_expert_tiles.py)."""
    if tokens >= COLUMNS_UP_TO or not problem.group:
        return 0
    return max(depth // problem.group, COLUMNS_UP_TO // tokens)


def widths(problem: Problem, tokens: int, depth: int) -> tuple[int, ...]:
    """Tokens of a tile of `depth` columns a step: as many as an expert has, or half of them; fewer than 8
    where a step is whole units whose groups make 8 or 16 columns of them, but for integers: those were slower
    so (Kimi-K2.5 TP8 on an H200, one token, 25 us in place of 20)."""
    each = tokens * problem.top_k / problem.experts
    wide = (8,) if tokens <= COLUMNS_UP_TO or each <= 3 else (8, 16) if each <= 8 else (16,)
    whole = problem.group > 0 and depth % problem.unit == 0
    few = [n for n in (1, 2, 4) if whole and depth // problem.group * n in SPREAD_COLUMNS]
    if not few or each > MOST_SPREAD or problem.format in _experts.INTEGERS:
        return wide
    if tokens == 1:
        return (few[0],)
    return tuple(few) if each <= 1 else (*few, *wide)


def usual_width(problem: Problem, tokens: int, depth: int) -> int:
    """Of `widths`, that of a tile for want of a measurement."""
    few = tokens * problem.top_k <= problem.experts or tokens == 1
    return widths(problem, tokens, depth)[0] if few else COLUMNS_UP_TO


def search_space(problem: Problem, tokens: int, gpu: Gpu) -> Iterator[Config]:
    """Tiles that are worth compiling; whether they fit is the compiler's to say."""
    for rows in (16, 32, 64, 128):
        if 2 * problem.inter % rows:
            continue
        for depth in _experts.pipeline_depths(problem.hidden, problem, remainder=True):
            if depth < 128 and problem.format != "bf16":
                continue
            chunk_bytes = rows * depth * _experts.weight_bytes(problem)
            for warps in (1, 2, 4):
                if rows // 16 < warps // 2 or not 1024 <= chunk_bytes / warps <= 16384:
                    continue
                for stages in (2, 3, 5):
                    if 8192 <= chunk_bytes * stages <= gpu.smem_per_block_bytes:
                        for width in widths(problem, tokens, depth):
                            config = Config(rows, width, depth, warps, stages)
                            yield from _with_and_without_tma(config, problem, gpu)


def _with_and_without_tma(config: Config, problem: Problem, gpu: Gpu) -> Iterator[Config]:
    yield config
    width = config.depth // 4 if problem.group else config.depth
    if "tma" in gpu.facts and width <= 256 and config.stages < 5:
        yield replace(config, tma=True)


def default(problem: Problem, tokens: int, gpu: Gpu) -> Config:
    """A tile that fits everywhere, for want of a tuned one."""
    rows = next(rows for rows in (64, 32, 16) if 2 * problem.inter % rows == 0)
    depths = _experts.pipeline_depths(problem.hidden, problem, remainder=True)
    depth = max(d for d in depths if d <= (128 if problem.group == 0 else 256))
    return Config(rows, usual_width(problem, tokens, depth), depth, warps=rows // 16)


# ---- 2. the device code


@triton.jit
def _pass(
    x, w, tiles, first_row, rows, scale, factor, bias, h, token, place, live, column,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, STORED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    DEPTH: tl.constexpr, PANEL: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
    CLAMPED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, ASM: tl.constexpr, SPREAD: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS by TOKENS; `place` [TOKENS]: where each token's choice stands."""
    row_of_x = x + spread(token, TOKENS, SPREAD)[:, None].to(tl.int64) * HIDDEN
    acc = tile(
        w, tiles, first_row, rows, scale, row_of_x, spread(live, TOKENS, SPREAD),
        2 * INTER, HIDDEN, STORED, ROWS, TOKENS, DEPTH, PANEL, FORMAT, DTYPE, GROUP, UNIT, STAGES, ASM,
        SPREAD,
    )  # fmt: skip
    if factor is not None:
        acc *= factor[:, None]
    if bias is not None:
        acc += bias[:, None]
    y = activation(acc, ROWS, TOKENS, CLAMPED, LIMIT, ALPHA)
    if h.dtype.element_ty == tl.float16:
        y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
    at = h + place[None, :].to(tl.int64) * INTER + column[:, None]
    tl.store(at, y.to(h.dtype.element_ty), mask=live[None, :], eviction_policy=KEEP)


@triton.jit
def program_of_choices(EXPERTS: tl.constexpr, MODE: tl.constexpr):
    """The choice or expert that this program is of, and which of its passes, 0 but for the last expert's."""
    which = tl.program_id(1)
    later = 0
    if MODE == "experts":  # the last ones begin: a shared expert, which is every token's, has the most to do
        which = tl.num_programs(1) - 1 - which
        later = tl.maximum(which - (EXPERTS - 1), 0)
        which -= later
    return which, later


@triton.jit
def earlier_choices(expert_ids, expert, which, choices, CHOICES: tl.constexpr):
    """How often `expert` was chosen before choice `which`; which choice was its first; how often in all."""
    c = tl.arange(0, CHOICES)
    its = tl.load(expert_ids + c, mask=c < choices, other=-1) == expert
    its_first = tl.min(tl.where(its, c, choices))
    return tl.sum((its & (c < which)).to(tl.int32)), its_first, tl.sum(its.to(tl.int32))


@triton.jit
def passes(which, later, earlier, count, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, MODE: tl.constexpr):
    """What a program passes through of an expert's `count` tokens: from, up to, by steps of."""
    if MODE == "experts":
        in_step = 1
        if which == EXPERTS - 1:
            in_step = tl.num_programs(1) - (EXPERTS - 1)
        return later * TOKENS, count, in_step * TOKENS
    return earlier, tl.minimum(earlier + TOKENS, count), TOKENS


@triton.jit
def gate_up_few(
    x, w, tiles, scale, row_scale, bias, expert_ids, h, table, ready, tokens, choices,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUPS: tl.constexpr, STORED: tl.constexpr,
    PANEL: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr,
    PADDED: tl.constexpr, MODE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
    CLAMPED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    LATE: tl.constexpr, SPREAD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    which, later = program_of_choices(EXPERTS, MODE)
    earlier = 0
    wait_for_launch_before(PDL)
    if not LATE:
        let_next_launch_begin(PDL)
    IN_PASSES: tl.constexpr = MODE != "one" and (MODE != "columns" or TOKENS < PADDED)
    t = tl.arange(0, TOKENS)
    rows = n * ROWS + tl.arange(0, ROWS)
    column = n * (ROWS // 2) + tl.arange(0, ROWS // 2)
    expert = which
    if MODE != "experts":
        expert = tl.load(expert_ids + which)
    if MODE == "one":
        place = which + t * 0
        live = t < 1
    else:
        if MODE != "experts":
            earlier, _, _ = earlier_choices(expert_ids, expert, which, choices, PADDED * TOP_K_PADDED)
            if earlier % TOKENS != 0:
                return
        all_t = tl.arange(0, PADDED)
        k = tl.arange(0, TOP_K_PADDED)
        place2 = all_t[:, None] * TOP_K + k[None, :]
        chosen2 = tl.load(
            expert_ids + place2, mask=(all_t < tokens)[:, None] & (k < TOP_K)[None, :], other=-1
        )
        place = tl.max(tl.where(chosen2 == expert, place2, -1), axis=1)  # [PADDED]
        live = place >= 0
        if IN_PASSES:
            count = tl.sum(live.to(tl.int32))
            rank = tl.cumsum(live.to(tl.int32), 0) - 1
        if MODE != "columns":
            if (n == 0) & (earlier + later == 0):
                entry = table + which * (PADDED + 1)
                tl.store(entry, count)
                tl.store(entry + 1 + rank, place, mask=live)
            if count == 0:
                if ready is not None:
                    say_ready(ready + expert)
                return
    e = expert.to(tl.int64)
    first_row = row_of_tile(expert, n * ROWS, 2 * INTER, STORED, PANEL)
    factor = None
    bias_of_row = None
    scale_of_row = None
    if GROUP > 0:
        matrix = w + e * (2 * INTER * (STORED // 4))
        scale_of_row = scales_of_rows(scale + e * (2 * INTER * GROUPS), rows, GROUPS, GROUP, UNIT, PANEL)
    else:
        matrix = w + e * (2 * INTER * HIDDEN)
        if scale is not None:
            block = block_of_row(rows, INTER)
            scale_of_row = scale + (e * (2 * INTER // 128) + block)[:, None] * (HIDDEN // 128)
    if row_scale is not None:
        factor = row_factors(row_scale, e * (2 * INTER) + rows, FORMAT, ASM and SPREAD == 0)
    if bias is not None:
        bias_of_row = tl.load(bias + e * (2 * INTER) + rows)
    if not IN_PASSES:
        _pass(
            x, matrix, tiles, first_row, rows, scale_of_row, factor, bias_of_row, h, t, place, live, column,
            HIDDEN, INTER, STORED, ROWS, TOKENS, DEPTH, PANEL, FORMAT, DTYPE, GROUP, UNIT, STAGES, CLAMPED,
            LIMIT, ALPHA, ASM, SPREAD, KEEP,
        )  # fmt: skip
        if LATE:
            let_next_launch_begin(PDL)
    else:
        first, last, step = passes(which, later, earlier, count, EXPERTS, TOKENS, MODE)
        for before in range(first, last, step):
            mine = (rank[None, :] == (before + t)[:, None]) & live[None, :]  # [TOKENS, PADDED]
            moved = tl.sum(tl.where(mine, place[None, :], 0), axis=1)
            _pass(
                x, matrix, tiles, first_row, rows, scale_of_row, factor, bias_of_row, h, moved // TOP_K,
                moved, before + t < count, column,
                HIDDEN, INTER, STORED, ROWS, TOKENS, DEPTH, PANEL, FORMAT, DTYPE, GROUP, UNIT, STAGES,
                CLAMPED, LIMIT, ALPHA, ASM, SPREAD, KEEP,
            )  # fmt: skip
    if ready is not None:
        say_ready(ready + expert)


# ---- 3. the launch


def request(
    problem: Problem,
    tokens: int,
    config: Config,
    gpu: Gpu,
    *,
    late: bool = False,
    counted: bool = False,
    interpreted: bool = False,
) -> CompileRequest:
    """The compile of this problem for so many tokens. Token counts of one mode and padding share it. `late`:
    the next launch begins when the programs of this one are done with their tiles, not before. `counted`: an
    expert's programs that are done are counted, for the second half to begin with that expert."""
    how = mode(problem, tokens)
    types, absent = _experts.weight_arguments(
        problem, problem.hidden, config.rows, config.depth, tma=config.tma
    )
    dtype = _experts.POINTER_NAMES[problem.dtype]
    inner = _experts.POINTER_NAMES[_experts.operand(problem)]
    types |= {"x": f"*{dtype}", "expert_ids": "*i32", "h": f"*{inner}"}
    if how in ("pairs", "experts"):
        types["table"] = "*i32"
    else:
        absent["table"] = None
    if counted:
        types["ready"] = "*i32"
    else:
        absent["ready"] = None
    constants = _experts.weight_constants(problem, problem.hidden, gpu, interpreted=interpreted)
    constants |= {
        "EXPERTS": problem.experts,
        "TOP_K": problem.top_k,
        "TOP_K_PADDED": triton.next_power_of_2(problem.top_k),
        "PADDED": padded(tokens),
        "MODE": how,
        "ROWS": config.rows,
        "TOKENS": config.tokens,
        "DEPTH": config.depth,
        "STAGES": config.stages,
        "CLAMPED": problem.activation == "clamped_swiglu",
        "LIMIT": problem.limit,
        "ALPHA": problem.alpha,
        "LATE": late,
        "SPREAD": spread_groups(problem, config.tokens, config.depth),
        "KEEP": _experts.eviction(padded(tokens) * problem.top_k * problem.inter * 2, gpu),
    }
    return CompileRequest(
        kernel=gate_up_few,
        signature=types | {"tokens": "i32", "choices": "i32"},
        constexprs=absent | constants,
        gpu=gpu,
        aligned=tuple(name for name, type in types.items() if type.startswith("*")),
        num_warps=config.warps,
        num_stages=config.stages,
        options={"launch_pdl": True} if constants["PDL"] else {},
        declares=(_experts.operand(problem),),
    )


def run(
    launcher: Launcher,
    problem: Problem,
    x: torch.Tensor,
    weights: Weights,
    expert_ids: torch.Tensor,
    h: torch.Tensor,
    table: torch.Tensor | None,
    ready: torch.Tensor | None = None,
) -> None:
    """Launches `request(...)` of as many tokens as `x` has. Writes `h` [tokens · top_k, inter] and, beyond 8
    tokens, `table` [programs, 1 + padded] int32; `ready` [experts] int32, zero before, counts programs."""
    tokens = x.shape[0]
    sizes = launcher.request.constexprs
    grid = (2 * problem.inter // sizes["ROWS"], launched(problem, tokens, sizes["TOKENS"]), 1)
    arguments = _experts.bound(launcher, weights)
    if "table" in launcher.request.signature:
        arguments["table"] = table
    if "ready" in launcher.request.signature:
        assert ready is not None, "programs that are done have nowhere to be counted"
        arguments["ready"] = ready
    launcher(
        grid, **arguments, x=x, expert_ids=expert_ids, h=h, tokens=tokens, choices=tokens * problem.top_k
    )


# ---- 4. the reference


def reference(problem: Problem, x: torch.Tensor, weights: Weights, expert_ids: torch.Tensor) -> torch.Tensor:
    """h [tokens · top_k, inter] in float32."""
    h = x.new_zeros(expert_ids.numel(), problem.inter, dtype=torch.float32)
    flat = expert_ids.flatten()
    for expert in flat.unique().tolist():
        places = torch.where(flat == expert)[0]
        matrix = _experts.dequantised(problem, weights, expert, halves=True)
        bias = _experts.biases_of(weights, expert, halves=True)
        gate_up = x[places // problem.top_k].float() @ matrix.T + bias
        h[places] = _experts.activated(problem, gate_up)
    return h
