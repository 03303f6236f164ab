"""The second half of an expert layer for many tokens, sorted by expert (kernels/moe_sort.py):

    y_p = weight_p · down_e · h_i     for the i-th choice in `order`: place p, expert e

h and h_scale as kernels/moe_gate_up.py leaves them; routing_weights [tokens, top_k] float32; y [choices,
hidden] bf16 by place, so that kernels/moe_combine.py finds a token's experts next to each other. Accumulation
in float32. Where the first half counts the programs of each block that are done (`ready`), a block begins
when its own are, not when the launch before has ended (kernels/_pdl.py).

Source: own. Measured: H200, 2026-11-21, docs/log/2026-11-21-gpu-kernels.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _experts
from firebox.kernels._expert_tiles import row_factors, row_of_tile, scales_of_rows
from firebox.kernels._experts import Problem, Weights
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before, wait_until_ready
from firebox.kernels._sorted import (
    NARROW,
    add_chunk,
    add_product,
    biased,
    empty_tile,
    in_units,
    rescaled_chunk,
    rescaled_product,
    scaled,
    store_tile,
)
from firebox.kernels._wgmma import products_done, waits
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher
from firebox.kernels.moe_gate_up import (
    FLIPPED_FROM,
    Config,
    inner_group,
    limits,
    narrow_flip,
    quantised,
    rescaled,
    warps_of,
    with_registers,
)
from firebox.kernels.moe_gate_up_few import accepts

__all__ = ["Config", "accepts"]

# ---- 1. the problem

OP = "moe_down"
LONG = 1024  # columns from which a tile is long enough for itself
MOST_HELD = 8  # steps of a tile whose activations a program keeps


def depths(problem: Problem) -> tuple[int, ...]:
    """Columns of a pipeline step: in FP8 as many as share a scale."""
    if quantised(problem):
        return (inner_group(problem),)
    fitting = _experts.pipeline_depths(problem.inter, problem, remainder=False)
    return tuple(d for d in fitting if 64 <= d <= 128) or fitting[-1:]


def search_space(problem: Problem, tokens: int, gpu: Gpu) -> Iterator[Config]:
    """Tiles of `tokens` choices that are worth compiling."""
    for rows in (64, 128, 256):
        for depth in depths(problem):
            for warps in warps_of(problem, tokens):
                if not 16 <= rows * tokens / (32 * warps) <= 160:
                    continue
                flip = quantised(problem) and tokens >= FLIPPED_FROM
                all_tiles = (1, 2, 4) if tokens < FLIPPED_FROM else (1, 4, 8, 10)
                for stages, tiles in itertools.product((3, 4), all_tiles):
                    if rows * tiles > problem.hidden or (tiles > 1 and problem.inter > LONG):
                        continue
                    config = Config(rows, tokens, depth, warps, stages, "tma" in gpu.facts, flip, tiles)
                    yield from with_registers(problem, config)
                    if tiles > 1 and can_hold(problem, depth):
                        yield replace(config, stages=stages - 1, held=True)


def can_hold(problem: Problem, depth: int) -> bool:
    """May a program keep the activations of all its tiles?"""
    return problem.group == 0 and problem.inter // depth <= MOST_HELD


def default(problem: Problem, tokens: int, gpu: Gpu) -> Config:
    """A tile that fits everywhere, for want of a tuned one."""
    rows = next(rows for rows in (128, 64, 32, 16) if problem.hidden % rows == 0)
    depth = max(depths(problem))
    flip = quantised(problem) and tokens >= FLIPPED_FROM
    return Config(rows, tokens, min(depth, 64 if problem.format == "bf16" else 128), 4, 3, flip=flip)


# ---- 2. the device code


@triton.jit
def _rows_of(n, HIDDEN: tl.constexpr, ROWS: tl.constexpr):
    """The n-th tile's rows: as they are counted, and those that are read, none beyond the last."""
    column = n * ROWS + tl.arange(0, ROWS)
    rows = column
    if HIDDEN % ROWS != 0:
        rows = tl.minimum(column, HIDDEN - 1)
    return column, rows


@triton.jit
def _scales_of_blocks(scale, e, n, HIDDEN: tl.constexpr, INTER: tl.constexpr, ROWS: tl.constexpr):
    """Where the scales of the n-th tile's first and of its last 128 rows begin."""
    block = n * ROWS // 128
    last_block = tl.minimum(block + (ROWS - 1) // 128, HIDDEN // 128 - 1)
    of_expert = scale + e * (HIDDEN // 128 * (INTER // 128))
    return of_expert + block * (INTER // 128), of_expert + last_block * (INTER // 128)


@triton.jit
def _of_choices(order, routing_weights, live, HIDDEN: tl.constexpr):
    """Each choice's weight, and where its row of y begins."""
    place = tl.load(order, mask=live, other=0)
    return tl.load(routing_weights + place, mask=live, other=0.0), place.to(tl.int64) * HIDDEN


@triton.jit
def _store(
    acc, n, row_scale, bias, y, weight, row_of_y, live, of_expert,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr, ASM: tl.constexpr, FLIP: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """The n-th tile, done; `of_expert`: where the expert's rows begin in `row_scale` and `bias`."""
    column, rows = _rows_of(n, HIDDEN, ROWS)
    of_row = None
    if row_scale is not None:
        of_row = row_factors(row_scale, of_expert + rows, FORMAT, ASM)
    acc = scaled(acc, of_row, None, FLIP)
    if bias is not None:
        acc = biased(acc, tl.load(bias + of_expert + rows), FLIP)
    acc = scaled(acc, None, weight, FLIP)
    store_tile(y, acc, row_of_y, column, live, column < HIDDEN, FLIP, HIDDEN % ROWS != 0, KEEP)


@triton.jit
def _store_units(
    acc, token_unit, unit, other_unit, of_other, n, scale, row_scale, bias, y, weight, row_of_y, live,
    of_expert,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr, ASM: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """_store, with FLIP, of what `rescaled_product` left."""
    if bias is None:  # nothing comes between a sum's unit and its weight
        token_unit *= weight
        weight = None
    acc = in_units(acc, token_unit, unit, other_unit, of_other, scale is not None)
    _store(
        acc, n, row_scale, bias, y, weight, row_of_y, live, of_expert, HIDDEN, ROWS, FORMAT, ASM, True, KEEP
    )


@triton.jit
def _add(
    acc, n, k, expert, matrix, tiles, scale, row_of_h, scale_of_choice, live,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUPS: tl.constexpr, STORED: tl.constexpr,
    PANEL: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, FLIP: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, H_GROUP: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """`acc` with step k of tile n."""
    _, rows = _rows_of(n, HIDDEN, ROWS)
    e = expert.to(tl.int64)
    scale_of_row = None
    other_scale = None
    if GROUP > 0:
        scale_of_row = scales_of_rows(scale + e * (HIDDEN * GROUPS), rows, GROUPS, GROUP, UNIT, PANEL)
    elif scale is not None:
        scale_of_row, other_scale = _scales_of_blocks(scale, e, n, HIDDEN, INTER, ROWS)
    return add_chunk(
        acc, matrix, tiles, row_of_tile(expert, n * ROWS, HIDDEN, STORED, PANEL), rows, scale_of_row,
        other_scale, tl.arange(0, ROWS) >= 128, row_of_h, scale_of_choice, live, k * DEPTH,
        HIDDEN, INTER, STORED, ROWS, DEPTH, PANEL, FORMAT, DTYPE, GROUP, UNIT, H_GROUP, ASM, FLIP,
    )  # fmt: skip


@triton.jit
def _tiles(
    h, h_scale, w, tiles, scale, row_scale, bias, order, routing_weights, y, first_tile, expert, first, count,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUPS: tl.constexpr, STORED: tl.constexpr,
    PANEL: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, TILES: tl.constexpr,
    HELD: tl.constexpr, FLIP: tl.constexpr, RESCALED: tl.constexpr, FORMAT: tl.constexpr,
    DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, H_GROUP: tl.constexpr, STAGES: tl.constexpr,
    WAITS: tl.constexpr, ASM: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """TILES tiles of ROWS for `count` choices from the `first` on, of which it takes TOKENS: their steps in
    one loop, so that a tile's weights are on their way while the one before is stored. HELD: it reads its
    activations once, a third of what a tile of 64 choices and 128 rows moves through the L2; a step of the
    loop is then a tile.

    4-bit weights are four products a step, the last of them asynchronous. Where a loop also chooses between
    its sum and a new tile's zeros, Triton (3.6 to 3.9, sm_90) puts no wait in between, and the assembler then
    waits after each of the 16 instructions. So one tile has a loop without that choice (gpt-oss's experts,
    256 to 4,096 tokens: 1 to 5 % less). With several, a sum of its own for each step costs more than that.
    One tile also finds its choices' weights after its loop, in which they would take 46 registers (64
    choices; 213, and two programs a multiprocessor where now there are three)."""
    i = tl.arange(0, TOKENS)
    live = i < count
    e = expert.to(tl.int64)
    at = (first + i).to(tl.int64)
    row_of_h = h + at[:, None] * INTER
    scale_of_choice = None
    if h_scale is not None:
        scale_of_choice = h_scale + at * (INTER // H_GROUP)
    matrix = w + e * (HIDDEN * (STORED // 4 if GROUP > 0 else INTER))
    STEPS: tl.constexpr = STORED // DEPTH
    ROW_TILES: tl.constexpr = (HIDDEN + ROWS - 1) // ROWS
    acc = empty_tile(ROWS, TOKENS, FLIP)
    if TILES > 1 or HELD or RESCALED:
        weight, row_of_y = _of_choices(order + first + i, routing_weights, live, HIDDEN)
    of_other = tl.arange(0, ROWS) >= 128
    if HELD:
        xs = ()
        of_tokens = ()
        for k in tl.static_range(STEPS):
            xt = tl.load(row_of_h + k * DEPTH + tl.arange(0, DEPTH)[None, :], mask=live[:, None], other=0.0)
            xs = xs + (xt,)
            if h_scale is not None:
                of_token = tl.load(scale_of_choice + k * DEPTH // H_GROUP, mask=live, other=1.0)
                of_tokens = of_tokens + (of_token,)
        for step in tl.range(0, tl.minimum(TILES, ROW_TILES - first_tile), num_stages=STAGES):
            n = first_tile + step
            _, rows = _rows_of(n, HIDDEN, ROWS)
            scale_of_row = None
            other_scale = None
            if scale is not None:
                scale_of_row, other_scale = _scales_of_blocks(scale, e, n, HIDDEN, INTER, ROWS)
            acc = None if RESCALED else empty_tile(ROWS, TOKENS, FLIP)
            token_unit = None
            unit = 1.0
            other_unit = 1.0
            for k in tl.static_range(STEPS):
                if tiles is None:
                    wt = tl.load(matrix + rows[:, None] * INTER + k * DEPTH + tl.arange(0, DEPTH)[None, :])
                else:
                    wt = tiles.load([row_of_tile(expert, n * ROWS, HIDDEN, STORED, PANEL), k * DEPTH])
                if RESCALED:
                    acc, token_unit, unit, other_unit = rescaled_product(
                        acc, token_unit, unit, other_unit, wt, xs[k], of_tokens[k], scale_of_row, other_scale,
                        of_other, k * DEPTH,
                    )  # fmt: skip
                else:
                    acc = add_product(
                        acc, wt, xs[k], of_tokens[k] if h_scale is not None else None, scale_of_row,
                        other_scale, of_other, k * DEPTH, FLIP,
                    )  # fmt: skip
            if RESCALED:
                _store_units(
                    acc, token_unit, unit, other_unit, of_other, n, scale, row_scale, bias, y, weight,
                    row_of_y, live, e * HIDDEN, HIDDEN, ROWS, FORMAT, ASM, KEEP,
                )  # fmt: skip
            else:
                _store(
                    acc, n, row_scale, bias, y, weight, row_of_y, live, e * HIDDEN,
                    HIDDEN, ROWS, FORMAT, ASM, FLIP, KEEP,
                )  # fmt: skip
    elif RESCALED:
        token_unit = tl.full((TOKENS,), 1.0, tl.float32)
        unit = 1.0
        other_unit = 1.0
        for step in tl.range(0, tl.minimum(TILES, ROW_TILES - first_tile) * STEPS, num_stages=STAGES):
            n = first_tile + step // STEPS
            k = step % STEPS
            _, rows = _rows_of(n, HIDDEN, ROWS)
            scale_of_row = None
            other_scale = None
            if scale is not None:
                scale_of_row, other_scale = _scales_of_blocks(scale, e, n, HIDDEN, INTER, ROWS)
            acc, token_unit, unit, other_unit = rescaled_chunk(
                acc, token_unit, unit, other_unit, matrix, tiles,
                row_of_tile(expert, n * ROWS, HIDDEN, STORED, PANEL), rows, scale_of_row, other_scale,
                of_other, row_of_h, scale_of_choice, live, k * DEPTH, INTER, DEPTH, H_GROUP,
            )  # fmt: skip
            if k == STEPS - 1:
                _store_units(
                    acc, token_unit, unit, other_unit, of_other, n, scale, row_scale, bias, y, weight,
                    row_of_y, live, e * HIDDEN, HIDDEN, ROWS, FORMAT, ASM, KEEP,
                )  # fmt: skip
                acc = empty_tile(ROWS, TOKENS, FLIP)
    elif TILES == 1:
        for k in tl.range(0, STEPS, num_stages=STAGES):
            acc = _add(
                acc, first_tile, k, expert, matrix, tiles, scale, row_of_h, scale_of_choice, live,
                HIDDEN, INTER, GROUPS, STORED, PANEL, ROWS, DEPTH, FLIP, FORMAT, DTYPE, GROUP, UNIT, H_GROUP,
                ASM,
            )  # fmt: skip
            products_done(k, WAITS)
        weight, row_of_y = _of_choices(order + first + i, routing_weights, live, HIDDEN)
        _store(
            acc, first_tile, row_scale, bias, y, weight, row_of_y, live, e * HIDDEN,
            HIDDEN, ROWS, FORMAT, ASM, FLIP, KEEP,
        )  # fmt: skip
    else:
        steps = tl.minimum(TILES, ROW_TILES - first_tile) * STEPS
        for step in tl.range(0, steps, num_stages=STAGES):
            n = first_tile + step // STEPS
            k = step % STEPS
            acc = _add(
                acc, n, k, expert, matrix, tiles, scale, row_of_h, scale_of_choice, live,
                HIDDEN, INTER, GROUPS, STORED, PANEL, ROWS, DEPTH, FLIP, FORMAT, DTYPE, GROUP, UNIT, H_GROUP,
                ASM,
            )  # fmt: skip
            if k == STEPS - 1:
                _store(
                    acc, n, row_scale, bias, y, weight, row_of_y, live, e * HIDDEN,
                    HIDDEN, ROWS, FORMAT, ASM, FLIP, KEEP,
                )  # fmt: skip
                acc = empty_tile(ROWS, TOKENS, FLIP)


@triton.jit
def down_sorted(
    h, h_scale, w, tiles, scale, row_scale, bias, order, blocks, routing_weights, y, ready, parts, width,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUPS: tl.constexpr, STORED: tl.constexpr,
    PANEL: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    PARTS: tl.constexpr, DEPTH: tl.constexpr, TILES: tl.constexpr, HELD: tl.constexpr, FLIP: tl.constexpr,
    NARROW_FLIP: tl.constexpr, RESCALED: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, H_GROUP: tl.constexpr,
    STAGES: tl.constexpr, WAITS: tl.constexpr, ASM: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of choices is PARTS programs' work; see _tiles, and moe_gate_up.py for NARROW."""
    if ready is None:
        wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    block = tl.program_id(1) // PARTS
    part = tl.program_id(1) % PARTS
    # The blocks were written before the first half began, so they may be read before it has ended.
    entry = blocks + block * 3
    in_block = tl.load(entry + 2)
    count = in_block - part * TOKENS
    if count <= 0:
        return
    if ready is not None:
        wait_until_ready(ready + block, parts * tl.cdiv(in_block, width), PDL)
    expert = tl.load(entry)
    first = tl.load(entry + 1) + part * TOKENS
    first_tile = tl.program_id(0) * TILES
    if TOKENS > NARROW and count <= NARROW:
        _tiles(
            h, h_scale, w, tiles, scale, row_scale, bias, order, routing_weights, y, first_tile, expert,
            first, count,
            HIDDEN, INTER, GROUPS, STORED, PANEL, ROWS, NARROW, DEPTH, TILES, False, NARROW_FLIP, False,
            FORMAT, DTYPE, GROUP, UNIT, H_GROUP, STAGES, WAITS, ASM, KEEP,
        )  # fmt: skip
    else:
        _tiles(
            h, h_scale, w, tiles, scale, row_scale, bias, order, routing_weights, y, first_tile, expert,
            first, count,
            HIDDEN, INTER, GROUPS, STORED, PANEL, ROWS, TOKENS, DEPTH, TILES, HELD, FLIP, RESCALED,
            FORMAT, DTYPE, GROUP, UNIT, H_GROUP, STAGES, WAITS, ASM, KEEP,
        )  # fmt: skip


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
    """One compile for any number of tokens. `block` and `counted` as in moe_gate_up."""
    types, absent = _experts.weight_arguments(
        problem, problem.inter, config.rows, config.depth, tma=config.tma
    )
    native, block = quantised(problem), block or config.tokens
    plain = f"*{_experts.POINTER_NAMES[problem.dtype]}"
    types |= {"h": "*fp8e4nv" if native else plain, "y": plain, "routing_weights": "*fp32"}
    types |= {"order": "*i32", "blocks": "*i32"} | ({"h_scale": "*fp32"} if native else {})
    absent |= {} if native else {"h_scale": None}
    if counted:
        types |= {"ready": "*i32", "parts": "i32", "width": "i32"}
    else:
        absent |= dict.fromkeys(("ready", "parts", "width"))
    constants: dict[str, Any] = _experts.weight_constants(
        problem, problem.inter, gpu, interpreted=interpreted
    )
    constants |= {
        "DTYPE": None if native else constants["DTYPE"],
        "ROWS": config.rows,
        "TOKENS": config.tokens,
        "PARTS": block // config.tokens,
        "DEPTH": config.depth,
        "TILES": config.tiles,
        "HELD": config.held,
        "RESCALED": rescaled(config, every_step=native),
        "FLIP": config.flip,
        "NARROW_FLIP": narrow_flip(config, gpu),
        "H_GROUP": inner_group(problem),
        "STAGES": config.stages,
        "WAITS": waits(gpu, decoded=problem.group > 0, interpreted=interpreted),
        "KEEP": _experts.eviction_sorted(problem, block, problem.hidden * 2, gpu),
    }
    return CompileRequest(
        down_sorted,
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
    h: torch.Tensor,
    h_scale: torch.Tensor | None,
    weights: Weights,
    order: torch.Tensor,
    blocks: torch.Tensor,
    routing_weights: torch.Tensor,
    y: torch.Tensor,
    ready: torch.Tensor | None = None,
    first_half: Config | None = None,
) -> None:
    """Writes `y` [choices, hidden]; one row of programs for each of `blocks` [n, 3]. `ready` [n] int32: what
    the first half, of these tiles, counted, if the request is `counted`."""
    arguments = _experts.bound(launcher, weights)
    if h_scale is not None:
        arguments["h_scale"] = h_scale
    if "ready" in launcher.request.signature:
        assert ready is not None and first_half is not None, "nothing was counted"
        parts = -(-2 * problem.inter // first_half.rows)
        arguments |= {"ready": ready, "parts": parts, "width": first_half.tokens}
    sizes = launcher.request.constexprs
    grid = (-(-problem.hidden // (sizes["ROWS"] * sizes["TILES"])), blocks.shape[0] * sizes["PARTS"], 1)
    launcher(grid, **arguments, h=h, order=order, blocks=blocks, routing_weights=routing_weights, y=y)


# ---- 4. the reference


def reference(
    problem: Problem,
    h: torch.Tensor,
    weights: Weights,
    expert_ids: torch.Tensor,
    order: torch.Tensor,
    routing_weights: torch.Tensor,
) -> torch.Tensor:
    """y [choices, hidden] in float32, by place. `h` as the kernel takes it, dequantised."""
    y = h.new_zeros(order.numel(), problem.hidden, dtype=torch.float32)
    places, experts = order.long(), expert_ids.flatten()[order.long()]
    for expert in experts.unique().tolist():
        mine = torch.where(experts == expert)[0]
        matrix = _experts.dequantised(problem, weights, expert, halves=False)
        bias = _experts.biases_of(weights, expert, halves=False)
        weight = routing_weights.flatten()[places[mine]].unsqueeze(-1)
        y[places[mine]] = (h[mine].float() @ matrix.T + bias) * weight
    return y
