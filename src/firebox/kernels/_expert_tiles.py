"""The device code of one tile of an expert layer, for the kernels of few and of many tokens:

    tile   acc [ROWS, TOKENS] += w [ROWS, DEPTH] · x [TOKENS, DEPTH]ᵀ

Weights are the first operand: there are many rows and few tokens, and an operand that must be decoded first
can then be handed over in registers.

A 4-bit word holds four codes (formats/layouts.py). Each of the four becomes a matrix of its own with the
columns it stands for (kernels/_words.py), so a chunk of 4-bit weights is four products.

SPREAD: a tile has fewer tokens than the 8 columns of the least product, so each of a chunk's SPREAD groups
has columns of its own, where x is zero in all other groups:

    acc [ROWS, TOKENS · SPREAD] += (codes · xᵀ) · scales [ROWS, SPREAD of each token]

and the sum over groups comes last. Scales then multiply sums in float32, one for each row and group, where
otherwise they multiply every weight: that took 14 of 46 instructions for 16 weights (sm_90, MXFP4).

UNIT: columns whose words hold codes a quarter of them apart. Where that is more than a group, a code's
columns are a group's, and its scale can multiply the sums of tiles that are as wide as the product
(`four_sums`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from firebox.kernels._words import (
    E2M1_LOWERED,
    decode,
    factor_of_code,
    lifted,
    scales_of,
    scales_of_codes,
    spread_scales,
)


@triton.jit
def columns_of_code(
    x, token_live, J: tl.constexpr, first, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RUN: tl.constexpr,
    MASKED: tl.constexpr, of_group, GROUP: tl.constexpr,
):  # fmt: skip
    """The columns of x that code J of DEPTH / 4 words meets, [TOKENS, DEPTH / 4]; see `columns_of_codes`."""
    OWN: tl.constexpr = J * RUN if RUN == GROUP else 0  # a word's codes are of one group, or each of its own
    ONE: tl.constexpr = RUN == GROUP and DEPTH <= 4 * RUN  # and that is all words' group
    i = tl.arange(0, DEPTH // 4)
    place = i // RUN * (4 * RUN) + i % RUN
    live = token_live[:, None]
    if of_group is not None:
        group = (place + OWN) // GROUP
        live = live & ((of_group == J)[:, None] if ONE else group[None, :] == of_group[:, None])
    if MASKED:
        ahead = tl.full((1, 1), OWN, tl.int32) if ONE else (place + OWN)[None, :]
        live = live & (first + ahead < COLUMNS)
    return tl.load(x + (first + place + J * RUN)[None, :], mask=live, other=0.0)


@triton.jit
def columns_of_codes(
    x, token_live, first, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RUN: tl.constexpr,
    MASKED: tl.constexpr, of_group, GROUP: tl.constexpr,
):  # fmt: skip
    """The columns of x that each of the four codes of DEPTH / 4 words meets, RUN words with theirs in order.
    `x` points at rows [TOKENS, 1]. MASKED: columns from COLUMNS on are not there. `of_group` [TOKENS]: the
    only group of these columns where a row of x is not zero, or None."""
    x0 = columns_of_code(x, token_live, 0, first, COLUMNS, DEPTH, RUN, MASKED, of_group, GROUP)
    x1 = columns_of_code(x, token_live, 1, first, COLUMNS, DEPTH, RUN, MASKED, of_group, GROUP)
    x2 = columns_of_code(x, token_live, 2, first, COLUMNS, DEPTH, RUN, MASKED, of_group, GROUP)
    x3 = columns_of_code(x, token_live, 3, first, COLUMNS, DEPTH, RUN, MASKED, of_group, GROUP)
    return x0, x1, x2, x3


@triton.jit
def four_products(
    acc, words, wide, minus, x0, x1, x2, x3, FORMAT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """acc + Σ over the four codes of a word. `wide`: what multiplies the weights of each code, four, or None:
    codes are multiplied as they are, and x is `lifted`."""
    w0, w1, w2, w3 = decode(words, minus, FORMAT, DTYPE, ASM)
    if wide is None:
        acc = tl.dot(w0, tl.trans(lifted(x0, FORMAT, ASM)), acc)
        acc = tl.dot(w1, tl.trans(lifted(x1, FORMAT, ASM)), acc)
        acc = tl.dot(w2, tl.trans(lifted(x2, FORMAT, ASM)), acc)
        return tl.dot(w3, tl.trans(lifted(x3, FORMAT, ASM)), acc)
    else:
        acc = tl.dot(w0 * wide[0], tl.trans(x0), acc)
        acc = tl.dot(w1 * wide[1], tl.trans(x1), acc)
        acc = tl.dot(w2 * wide[2], tl.trans(x2), acc)
        return tl.dot(w3 * wide[3], tl.trans(x3), acc)


@triton.jit
def four_sums(
    acc, words, packed, x0, x1, x2, x3, FORMAT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """As four_products in units, where each code's products have one scale a row: it multiplies their sums.
    `packed` [ROWS, 1] as `words_and_scales` loads them. With ASM `acc` is times E2M1_LOWERED."""
    w0, w1, w2, w3 = decode(words, packed, FORMAT, DTYPE, ASM)
    acc += tl.dot(w0, tl.trans(lifted(x0, FORMAT, ASM))) * factor_of_code(packed, 0, ASM)
    acc += tl.dot(w1, tl.trans(lifted(x1, FORMAT, ASM))) * factor_of_code(packed, 1, ASM)
    acc += tl.dot(w2, tl.trans(lifted(x2, FORMAT, ASM))) * factor_of_code(packed, 2, ASM)
    return acc + tl.dot(w3, tl.trans(lifted(x3, FORMAT, ASM))) * factor_of_code(packed, 3, ASM)


@triton.jit
def raised(acc, GROUP: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr, SPREAD: tl.constexpr):
    """`acc` of all columns as it should be: `four_sums` leaves it times E2M1_LOWERED."""
    if UNIT > GROUP and ASM and SPREAD == 0:
        return acc * (1 / E2M1_LOWERED)
    else:
        return acc


@triton.jit
def spread(of_token, TOKENS: tl.constexpr, SPREAD: tl.constexpr):
    """[TOKENS] → [TOKENS · SPREAD], each as often as there are groups; as it is without SPREAD."""
    if SPREAD == 0:
        return of_token
    else:
        return tl.reshape(tl.broadcast_to(of_token[:, None], (TOKENS, SPREAD)), (TOKENS * SPREAD,))


@triton.jit
def added_groups(acc, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPREAD: tl.constexpr):
    """[ROWS, TOKENS · SPREAD] → [ROWS, TOKENS]; as it is without SPREAD."""
    if SPREAD == 0:
        return acc
    else:
        return tl.sum(tl.reshape(acc, (ROWS, TOKENS, SPREAD)), axis=2)


@triton.jit
def scales_of_rows(
    scale, rows, GROUPS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, PANEL: tl.constexpr
):  # fmt: skip
    """Where the group scales of `rows` [ROWS] begin, [ROWS, 1]; in units, those of a row together as one
    int32."""
    if UNIT > GROUP:
        return scale.to(tl.pointer_type(tl.int32), bitcast=True) + rows[:, None]
    else:
        return scale + rows[:, None] * together(GROUPS, GROUP, PANEL)


@triton.jit
def together(GROUPS: tl.constexpr, GROUP: tl.constexpr, PANEL: tl.constexpr):
    """Group scales of a row that lie next to each other."""
    return PANEL // GROUP if PANEL > 0 else GROUPS


@triton.jit
def row_of_tile(expert, row, ALL: tl.constexpr, STORED: tl.constexpr, PANEL: tl.constexpr):
    """Where the tile from `row` on begins in the rows of all experts, of which each has ALL; in panels, in
    those of its first one."""
    PANELS: tl.constexpr = STORED // PANEL if PANEL > 0 else 1
    return expert * (ALL * PANELS) + row


@triton.jit
def words_and_scales(
    w, tiles, first_row, rows, scale, first,
    ALL: tl.constexpr, STORED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PANEL: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr,
    POLICY: tl.constexpr,
):  # fmt: skip
    """Words [ROWS, DEPTH / 4] from that of the column `first` on, as they lie; in panels, all of one. Then
    what `scales_of` says of them, or, in units, the scales of a row's groups packed, [ROWS, 1] int32 (twice).
    ALL: rows of the expert's matrix; POLICY: for how long the L2 keeps words."""
    width: tl.constexpr = PANEL if PANEL > 0 else STORED
    panel = 0
    within = first
    if PANEL > 0:
        panel = first // PANEL
        within = 0 if DEPTH == PANEL else first % PANEL
        scale += panel * (ALL if UNIT > GROUP else ALL * (PANEL // GROUP))
    if tiles is None:
        i = within // 4 + tl.arange(0, DEPTH // 4)
        at = panel * (ALL * (width // 4)) + rows[:, None] * (width // 4)
        words = tl.load(w + at + i[None, :], eviction_policy=POLICY)
    else:
        words = tiles.load([first_row + panel * ALL, within // 4])
    if UNIT > GROUP:
        packed = tl.load(scale)
        return words, packed, packed
    else:
        wide, minus = scales_of(scale, within, None, ROWS, DEPTH, GROUP, FORMAT, DTYPE, ASM)
        return words, wide, minus


@triton.jit
def spread_chunk(
    acc, w, tiles, first_row, rows, scale, x, token_live, first,
    ALL: tl.constexpr, COLUMNS: tl.constexpr, STORED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    DEPTH: tl.constexpr, PANEL: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, ASM: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """As four_bit_chunk for `acc` [ROWS, TOKENS · SPREAD]; `x` and `token_live` are `spread`. DEPTH has
    SPREAD groups at most, and whole units."""
    tl.static_assert(DEPTH % UNIT == 0, "a step of spread groups is whole units")
    STEP: tl.constexpr = DEPTH if PANEL == 0 or DEPTH < PANEL else PANEL
    of_group = tl.arange(0, TOKENS * SPREAD) % SPREAD
    part = tl.zeros((ROWS, TOKENS * SPREAD), tl.float32)
    for step in tl.static_range(DEPTH // STEP):
        at = first + step * STEP
        words, _, minus = words_and_scales(
            w, tiles, first_row, rows, scale, at,
            ALL, STORED, ROWS, STEP, PANEL, FORMAT, DTYPE, GROUP, UNIT, ASM, "evict_first",
        )  # fmt: skip
        x0, x1, x2, x3 = columns_of_codes(
            x, token_live, at, COLUMNS, STEP, UNIT // 4, STORED > COLUMNS,
            of_group - step * (STEP // GROUP), GROUP,
        )  # fmt: skip
        part = four_products(part, words, None, minus, x0, x1, x2, x3, FORMAT, DTYPE, ASM)
    live = None
    if DEPTH // GROUP < SPREAD:
        live = tl.arange(0, SPREAD) < DEPTH // GROUP
    factors = spread_scales(
        scale, first, live, ROWS, TOKENS, SPREAD, GROUP, UNIT, FORMAT, ASM, PANEL // GROUP, ALL
    )
    return acc + part * factors


@triton.jit
def four_bit_chunk(
    acc, w, tiles, first_row, rows, scale, x, token_live, first,
    ALL: tl.constexpr, COLUMNS: tl.constexpr, STORED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    PANEL: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr,
    POLICY: tl.constexpr, RUN: tl.constexpr, BY_SUMS: tl.constexpr,
):  # fmt: skip
    """acc += DEPTH columns' worth of words from that of the column `first` on, panel by panel. RUN: words
    whose codes meet columns of x in order. BY_SUMS: in units scales multiply sums (`four_sums`)."""
    STEP: tl.constexpr = DEPTH if PANEL == 0 or DEPTH < PANEL else PANEL
    for step in tl.static_range(DEPTH // STEP):
        at = first + step * STEP
        words, wide, minus = words_and_scales(
            w, tiles, first_row, rows, scale, at,
            ALL, STORED, ROWS, STEP, PANEL, FORMAT, DTYPE, GROUP, UNIT, ASM, POLICY,
        )  # fmt: skip
        if STEP < UNIT:  # so many words of a unit stand for as many columns of each of its quarters
            at = at // UNIT * UNIT + at % UNIT // 4
        x0, x1, x2, x3 = columns_of_codes(
            x, token_live, at, COLUMNS, STEP, RUN, STORED > COLUMNS, None, GROUP
        )
        if UNIT > GROUP and BY_SUMS:
            acc = four_sums(acc, words, wide, x0, x1, x2, x3, FORMAT, DTYPE, ASM)
        else:
            scales = (wide, wide, wide, wide)
            if UNIT > GROUP:
                scales = scales_of_codes(wide, DTYPE, ASM)
            acc = four_products(acc, words, scales, minus, x0, x1, x2, x3, FORMAT, DTYPE, ASM)
    return acc


@triton.jit
def chunk(
    acc, w, tiles, first_row, rows, scale, x, token_live, first,
    ALL: tl.constexpr, COLUMNS: tl.constexpr, STORED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    PANEL: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    ASM: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """acc [ROWS, TOKENS] += the columns `first` … first + DEPTH. `w` points at the expert's matrix of ALL
    rows, `tiles` is a tensor descriptor of all experts' or None. DTYPE: what weights are turned into, None
    for a product of their own type. `scale`: with groups, points at the rows' [ROWS, 1]; with blocks, at the
    rows' blocks; or None. In units of 4-bit weights the sum of all columns is to be `raised`."""
    if SPREAD > 0:
        acc = spread_chunk(
            acc, w, tiles, first_row, rows, scale, x, token_live, first,
            ALL, COLUMNS, STORED, ROWS, TOKENS, DEPTH, PANEL, FORMAT, DTYPE, GROUP, UNIT, ASM, SPREAD,
        )  # fmt: skip
    elif GROUP > 0:
        acc = four_bit_chunk(
            acc, w, tiles, first_row, rows, scale, x, token_live, first,
            ALL, COLUMNS, STORED, ROWS, DEPTH, PANEL, FORMAT, DTYPE, GROUP, UNIT, ASM, "evict_first",
            UNIT // 4, True,
        )  # fmt: skip
    else:
        i = first + tl.arange(0, DEPTH)
        if tiles is None:
            wt = tl.load(w + rows[:, None] * COLUMNS + i[None, :], eviction_policy="evict_first")
        else:
            wt = tiles.load([first_row, first])
        xt = tl.load(x + i[None, :], mask=token_live[:, None], other=0.0)
        if DTYPE is not None:
            wt = wt.to(DTYPE)
            xt = xt.to(DTYPE)
        if scale is not None:
            acc += tl.dot(wt, tl.trans(xt)) * tl.load(scale + first // 128)
        else:
            acc = tl.dot(wt, tl.trans(xt), acc)
    return acc


@triton.jit
def tile(
    w, tiles, first_row, rows, scale, x, token_live,
    ALL: tl.constexpr, COLUMNS: tl.constexpr, STORED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    DEPTH: tl.constexpr, PANEL: tl.constexpr, FORMAT: tl.constexpr,
    DTYPE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
    SPREAD: tl.constexpr,
):  # fmt: skip
    """Σ over all columns: chunks of DEPTH in a pipeline of STAGES, then what is left. With SPREAD, `x` and
    `token_live` are `spread`."""
    acc = tl.zeros((ROWS, TOKENS if SPREAD == 0 else TOKENS * SPREAD), tl.float32)
    WHOLE: tl.constexpr = STORED // DEPTH * DEPTH
    for first in tl.range(0, WHOLE, DEPTH, num_stages=STAGES):
        acc = chunk(
            acc, w, tiles, first_row, rows, scale, x, token_live, first,
            ALL, COLUMNS, STORED, ROWS, TOKENS, DEPTH, PANEL, FORMAT, DTYPE, GROUP, UNIT, ASM, SPREAD,
        )  # fmt: skip
    if WHOLE < STORED:
        acc = chunk(
            acc, w, None, first_row, rows, scale, x, token_live, WHOLE,
            ALL, COLUMNS, STORED, ROWS, TOKENS, STORED - WHOLE, PANEL, FORMAT, DTYPE, GROUP, UNIT, ASM,
            SPREAD,
        )  # fmt: skip
    return added_groups(raised(acc, GROUP, UNIT, ASM, SPREAD), ROWS, TOKENS, SPREAD)


@triton.jit
def row_factors(row_scale, at, FORMAT: tl.constexpr, ASM: tl.constexpr):
    """The rows' scales [ROWS] at the places `at`; with what `group_scales` left of NVFP4's factor."""
    factor = tl.load(row_scale + at)
    if (FORMAT == "nvfp4" or FORMAT == "nvfp4_nibbles") and ASM:
        factor *= 256.0
    return factor


@triton.jit
def block_of_row(rows, INTER: tl.constexpr):
    """Interleaved row → its block of 128 rows; gate blocks stand before up blocks."""
    return (rows // 16 * 8 + rows % 8 + rows // 8 % 2 * INTER) // 128


@triton.jit
def inverse(x):
    """1 / x for x > 0, to within 2⁻²² of it; 0 for infinity. Two instructions; division takes twelve."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def activation(
    acc, ROWS: tl.constexpr, TOKENS: tl.constexpr, CLAMPED: tl.constexpr, LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
):  # fmt: skip
    """`acc` [ROWS, TOKENS] of interleaved gate and up rows → [ROWS / 2, TOKENS]."""
    runs = tl.permute(tl.reshape(acc, (ROWS // 16, 2, 8, TOKENS)), (0, 2, 3, 1))
    gate, up = tl.split(runs)
    gate = tl.reshape(gate, (ROWS // 2, TOKENS))
    up = tl.reshape(up, (ROWS // 2, TOKENS))
    return gated(gate, up, CLAMPED, LIMIT, ALPHA)


@triton.jit
def gated(gate, up, CLAMPED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """What the two halves make."""
    if CLAMPED:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (up + 1) * gate * inverse(1.0 + tl.exp(-ALPHA * gate))
    return gate * inverse(1.0 + tl.exp(-gate)) * up
