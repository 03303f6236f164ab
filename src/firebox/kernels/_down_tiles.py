"""Device code of the second half of an expert layer for few tokens (kernels/moe_down_few.py): what a program
does with its tiles once it knows its expert and that expert's tokens. Products go to `products` [choices,
HIDDEN], each token's with its routing weight, at the `place` of its choice.

    one_pass      TOKENS of an expert's tokens through the program's tiles, in a pipeline of steps
    whole_tile    all columns of one tile at once: the weights before the launch before has ended
"""

from __future__ import annotations

import triton
import triton.language as tl

from firebox.kernels._expert_tiles import (
    added_groups,
    chunk,
    columns_of_codes,
    four_products,
    raised,
    row_factors,
    row_of_tile,
    scales_of_rows,
    spread,
    tile,
)
from firebox.kernels._pdl import wait_for_launch_before
from firebox.kernels._words import in_panels, scales_of, scales_of_codes, spread_scales


@triton.jit
def store(
    acc, factor, bias, routing_weights, products, rows, place, live, HIDDEN: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    if factor is not None:
        acc *= factor[:, None]
    if bias is not None:
        acc += bias[:, None]
    acc *= tl.load(routing_weights + place, mask=live, other=0.0)[None, :]
    at = products + place[None, :].to(tl.int64) * HIDDEN + rows[:, None]
    tl.store(at, acc.to(products.dtype.element_ty), mask=live[None, :], eviction_policy=KEEP)


@triton.jit
def first_scale(
    scale, rows, INTER: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    PANEL: tl.constexpr,
):  # fmt: skip
    """Where the scales of rows begin in an expert's, [ROWS, 1]."""
    if GROUP > 0:
        return scales_of_rows(scale, rows, GROUPS, GROUP, UNIT, PANEL)
    else:
        return scale + (rows // 128)[:, None] * (INTER // 128)


@triton.jit
def pass_of_tiles(
    h, matrix, tiles, expert, first_tile, scale, row_scale, bias, routing_weights, products, place, live,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUPS: tl.constexpr, STORED: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, PANEL: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr, SPREAD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """As one_pass for the tiles from `first_tile` on; `scale` points at the expert's."""
    COLUMNS: tl.constexpr = TOKENS if SPREAD == 0 else TOKENS * SPREAD
    STEPS: tl.constexpr = STORED // DEPTH
    row_of_h = h + spread(place, TOKENS, SPREAD)[:, None].to(tl.int64) * INTER
    live_h = spread(live, TOKENS, SPREAD)
    first_of_expert = expert.to(tl.int64) * HIDDEN
    steps = tl.minimum(TILES, HIDDEN // ROWS - first_tile) * STEPS
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = first_tile + step // STEPS
        k = step % STEPS
        rows = n * ROWS + tl.arange(0, ROWS)
        scale_of_row = None
        if scale is not None:
            scale_of_row = first_scale(scale, rows, INTER, GROUPS, GROUP, UNIT, PANEL)
        acc = chunk(
            acc, matrix, tiles, row_of_tile(expert, n * ROWS, HIDDEN, STORED, PANEL), rows, scale_of_row,
            row_of_h, live_h, k * DEPTH,
            HIDDEN, INTER, STORED, ROWS, TOKENS, DEPTH, PANEL, FORMAT, DTYPE, GROUP, UNIT, ASM, SPREAD,
        )  # fmt: skip
        if k == STEPS - 1:
            factor = None
            if row_scale is not None:
                factor = row_factors(row_scale, first_of_expert + rows, FORMAT, ASM and SPREAD == 0)
            bias_of_row = None
            if bias is not None:
                bias_of_row = tl.load(bias + first_of_expert + rows)
            done = added_groups(raised(acc, GROUP, UNIT, ASM, SPREAD), ROWS, TOKENS, SPREAD)
            store(done, factor, bias_of_row, routing_weights, products, rows, place, live, HIDDEN, KEEP)
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def one_pass(
    h, matrix, tiles, expert, n, rows, scale, row_scale, bias, factor, bias_of_row, routing_weights, products,
    place, live,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUPS: tl.constexpr, STORED: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, PANEL: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr, SPREAD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The n-th program's tiles for the tokens at `place`. `scale` points at the expert's; `rows`, `factor`
    and `bias_of_row` are the first tile's."""
    if TILES > 1:
        pass_of_tiles(
            h, matrix, tiles, expert, n * TILES, scale, row_scale, bias, routing_weights, products, place,
            live, HIDDEN, INTER, GROUPS, STORED, ROWS, TILES, TOKENS, DEPTH, PANEL, FORMAT, DTYPE, GROUP,
            UNIT, STAGES, ASM, SPREAD, KEEP,
        )  # fmt: skip
    else:
        row_of_h = h + spread(place, TOKENS, SPREAD)[:, None].to(tl.int64) * INTER
        scale_of_row = None
        if scale is not None:
            scale_of_row = first_scale(scale, rows, INTER, GROUPS, GROUP, UNIT, PANEL)
        acc = tile(
            matrix, tiles, row_of_tile(expert, n * ROWS, HIDDEN, STORED, PANEL), rows, scale_of_row, row_of_h,
            spread(live, TOKENS, SPREAD),
            HIDDEN, INTER, STORED, ROWS, TOKENS, DEPTH, PANEL, FORMAT, DTYPE, GROUP, UNIT, STAGES, ASM,
            SPREAD,
        )  # fmt: skip
        store(acc, factor, bias_of_row, routing_weights, products, rows, place, live, HIDDEN, KEEP)


@triton.jit
def _of_words(of_units, UNIT: tl.constexpr):
    """[ROWS, units] → [ROWS, words], the same for all words of a unit."""
    ROWS: tl.constexpr = of_units.shape[0]
    UNITS: tl.constexpr = of_units.shape[1]
    wide = tl.broadcast_to(of_units[:, :, None], (ROWS, UNITS, UNIT // 4))
    return tl.reshape(wide, (ROWS, UNITS * (UNIT // 4)))


@triton.jit
def _whole_scales(
    scale, HIDDEN: tl.constexpr, INTER: tl.constexpr, STORED: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, PANEL: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """What multiplies the weights of each of a word's codes, four of [ROWS, WIDE / 4], and `minus` as
    `scales_of` returns it."""
    if UNIT > GROUP:
        unit = tl.arange(0, WIDE // UNIT)[None, :]
        packed = tl.load(scale + unit * HIDDEN, mask=unit < STORED // UNIT, other=0)  # [ROWS, units]
        s0, s1, s2, s3 = scales_of_codes(packed, DTYPE, ASM)
        found = (_of_words(s0, UNIT), _of_words(s1, UNIT), _of_words(s2, UNIT), _of_words(s3, UNIT))
        return found, packed
    else:
        live = tl.arange(0, WIDE // GROUP) < INTER // GROUP
        wide, minus = scales_of(scale, 0, live, ROWS, WIDE, GROUP, FORMAT, DTYPE, ASM, PANEL // GROUP, HIDDEN)
        return (wide, wide, wide, wide), minus


@triton.jit
def whole_tile(
    h, matrix, scale, factor, bias, routing_weights, products, rows, first_in_expert, place, live,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, STORED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, PANEL: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, ASM: tl.constexpr, SPREAD: tl.constexpr, PDL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The weights first, then the wait, then h. WIDE: INTER up to a power of two."""
    row_of_h = h + spread(place, TOKENS, SPREAD)[:, None].to(tl.int64) * INTER
    live_h = spread(live, TOKENS, SPREAD)
    acc = tl.zeros((ROWS, TOKENS if SPREAD == 0 else TOKENS * SPREAD), tl.float32)
    if GROUP > 0:
        i = tl.arange(0, WIDE // 4)
        words = tl.load(
            matrix + in_panels(rows[:, None], i[None, :], HIDDEN, STORED // 4, PANEL // 4),
            mask=(i < STORED // 4)[None, :], other=0,
        )  # fmt: skip
        wide, minus = _whole_scales(
            scale, HIDDEN, INTER, STORED, WIDE, ROWS, PANEL, FORMAT, DTYPE, GROUP, UNIT, ASM
        )
        of_group = None
        if SPREAD > 0:
            of_group = tl.arange(0, TOKENS * SPREAD) % SPREAD
            spread_live = tl.arange(0, SPREAD) < INTER // GROUP
            factors = spread_scales(
                scale, 0, spread_live, ROWS, TOKENS, SPREAD, GROUP, UNIT, FORMAT, ASM, PANEL // GROUP, HIDDEN
            )
            wide = None
        wait_for_launch_before(PDL)
        h0, h1, h2, h3 = columns_of_codes(
            row_of_h, live_h, 0, INTER, WIDE, UNIT // 4, WIDE > INTER, of_group, GROUP
        )
        acc = four_products(acc, words, wide, minus, h0, h1, h2, h3, FORMAT, DTYPE, ASM)
        if SPREAD > 0:
            acc = added_groups(acc * factors, ROWS, TOKENS, SPREAD)
    else:
        i = tl.arange(0, WIDE)
        there = i < INTER
        w = tl.load(matrix + rows[:, None] * INTER + i[None, :], mask=there[None, :], other=0.0)
        if scale is not None:  # all ROWS lie in one block of rows: its scales can go to h
            of_column = tl.load(
                scale + first_in_expert // 128 * (INTER // 128) + i // 128, mask=there, other=0.0
            )
            largest = tl.max(of_column, axis=0)
        wait_for_launch_before(PDL)
        x = tl.load(row_of_h + i[None, :], mask=live[:, None] & there[None, :], other=0.0)
        if scale is not None:
            x = x.to(tl.float32) * (of_column / largest)[None, :]
            acc = tl.dot(w.to(DTYPE), tl.trans(x.to(DTYPE)), acc) * largest
        else:
            acc = tl.dot(w.to(DTYPE), tl.trans(x.to(DTYPE)), acc)
    store(acc, factor, bias, routing_weights, products, rows, place, live, HIDDEN, KEEP)
