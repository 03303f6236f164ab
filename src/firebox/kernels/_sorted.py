"""Device code that the two sorted expert kernels share: what one pipeline step adds to a tile of many tokens.

    flip   acc [TOKENS, ROWS] += x [TOKENS, DEPTH] · w [ROWS, DEPTH]ᵀ
    else   acc [ROWS, TOKENS] += w [ROWS, DEPTH] · x [TOKENS, DEPTH]ᵀ

4-bit weights are the first operand, because decoded numbers can be handed over in registers; FP8 with a scale
per token and 128 columns goes the other way, because a thread then holds few tokens and needs few scales. A
4-bit product in units below 64 columns reads activations whose columns lie as layouts.arranged_columns says:
each of a word's four codes then meets whole 32-byte sectors. Without that, moving activations took twice the
L2's time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from firebox.formats.layouts import ARRANGED, PER_WORD
from firebox.kernels._expert_tiles import activation, four_bit_chunk, gated, inverse

NARROW = tl.constexpr(32)  # choices of a tile that has few
LEAST_SCALE = tl.constexpr(1e-12)  # of a block; units of nothing would not come back
X_RUN = tl.constexpr(ARRANGED // PER_WORD)


@triton.jit
def empty_tile(ROWS: tl.constexpr, TOKENS: tl.constexpr, FLIP: tl.constexpr):
    if FLIP:
        return tl.zeros((TOKENS, ROWS), tl.float32)
    else:
        return tl.zeros((ROWS, TOKENS), tl.float32)


@triton.jit
def _loaded(
    w, tiles, first_row, rows, x, live, first, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """A step of weights that are not in groups, [ROWS, DEPTH], and of x, [TOKENS, DEPTH]; see add_chunk."""
    i = first + tl.arange(0, DEPTH)
    if tiles is None:
        wt = tl.load(w + rows[:, None] * COLUMNS + i[None, :])
    else:
        wt = tiles.load([first_row, first])
    return wt, tl.load(x + i[None, :], mask=live[:, None], other=0.0)


@triton.jit
def add_chunk(
    acc, w, tiles, first_row, rows, scale, other_scale, of_other, x, x_scale, live, first,
    ALL: tl.constexpr, COLUMNS: tl.constexpr, STORED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    PANEL: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, UNIT: tl.constexpr, X_GROUP: tl.constexpr, ASM: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """`acc` with the columns `first` … first + DEPTH. `w` points at the expert's matrix of ALL rows, `rows`
    [ROWS] are the tile's, none beyond the last; `tiles` is a tensor descriptor of all experts' matrices or
    None. `scale`: with groups, points at the rows' [ROWS, 1]; with blocks, at the block of the rows that are
    not `of_other` [ROWS], and `other_scale` at that of those that are. X_GROUP: columns of x that share an
    `x_scale` [TOKENS] (0: nothing to apply here)."""
    if GROUP > 0:
        return four_bit_chunk(
            acc, w, tiles, first_row, rows, scale, x, live, first,
            ALL, COLUMNS, STORED, ROWS, DEPTH, PANEL, FORMAT, DTYPE, GROUP, UNIT, ASM, "",
            X_RUN if UNIT < 4 * X_RUN else UNIT // 4, False,
        )  # fmt: skip
    else:
        wt, xt = _loaded(w, tiles, first_row, rows, x, live, first, COLUMNS, DEPTH)
        of_token = None
        if X_GROUP > 0:
            of_token = tl.load(x_scale + first // X_GROUP, mask=live, other=0.0)
        return add_product(acc, wt, xt, of_token, scale, other_scale, of_other, first, FLIP)


@triton.jit
def rescaled_chunk(
    acc, token_before, row_before, other_before, w, tiles, first_row, rows, scale, other_scale, of_other,
    x, x_scale, live, first,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, X_GROUP: tl.constexpr,
):  # fmt: skip
    """As add_chunk with FLIP, by `rescaled_product`."""
    wt, xt = _loaded(w, tiles, first_row, rows, x, live, first, COLUMNS, DEPTH)
    of_token = tl.load(x_scale + first // X_GROUP, mask=live, other=1.0)
    return rescaled_product(
        acc, token_before, row_before, other_before, wt, xt, of_token, scale, other_scale, of_other, first
    )


@triton.jit
def rescaled_product(
    acc, token_before, row_before, other_before, wt, xt, of_token, scale, other_scale, of_other, first
):
    """As add_product with FLIP, but `acc` is in units of the step's scales, and comes in those of the step
    before: of tokens, of rows, of other rows (1 without blocks). So there are no sums beside `acc`, for which
    a tile of 128 numbers a thread has no registers. All columns' products are then added in the tensor cores,
    as they are in formats without scales at each step (4,096 columns: the same error, 0.043). `acc` None:
    there is no step before. → acc and this step's units."""
    of_row = row_before
    others = other_before
    if scale is not None:
        of_row = tl.maximum(tl.load(scale + first // 128), LEAST_SCALE)
        others = tl.maximum(tl.load(other_scale + first // 128), LEAST_SCALE)
    if acc is None:
        acc = tl.dot(xt, tl.trans(wt))
    else:
        change = (token_before * inverse(of_token))[:, None]
        if scale is not None:
            of_rows = row_before * inverse(of_row)
            change *= tl.where(of_other, other_before * inverse(others), of_rows)[None, :]
        acc = tl.dot(xt, tl.trans(wt), acc * change)
    return acc, of_token, of_row, others


@triton.jit
def in_units(acc, of_token, of_row, others, of_other, BLOCKS: tl.constexpr):
    """The sums that `rescaled_chunk` left."""
    if BLOCKS:
        return acc * _factor(tl.where(of_other, others, of_row), of_token, True)
    else:
        return acc * of_token[:, None]


@triton.jit
def add_product(acc, wt, xt, of_token, scale, other_scale, of_other, first, FLIP: tl.constexpr):
    """`acc` with one step of weights that are not in groups: `wt` [ROWS, DEPTH], `xt` [TOKENS, DEPTH],
    `of_token` [TOKENS] their scales, or None; the rest as in add_chunk."""
    if of_token is not None or scale is not None:
        of_row = None
        if scale is not None:
            of_row = tl.where(of_other, tl.load(other_scale + first // 128), tl.load(scale + first // 128))
        if FLIP:
            part = tl.dot(xt, tl.trans(wt))
        else:
            part = tl.dot(wt, tl.trans(xt))
        return acc + part * _factor(of_row, of_token, FLIP)
    else:
        if FLIP:
            return tl.dot(xt, tl.trans(wt), acc)
        else:
            return tl.dot(wt, tl.trans(xt), acc)


@triton.jit
def _factor(of_row, of_token, FLIP: tl.constexpr):
    """What multiplies each sum: a number per row times one per token, either of which may be None. A thread
    has few different ones, so that they are multiplied first."""
    if of_row is None:
        return of_token[:, None] if FLIP else of_token[None, :]
    elif of_token is None:
        return of_row[None, :] if FLIP else of_row[:, None]
    else:
        return of_row[None, :] * of_token[:, None] if FLIP else of_row[:, None] * of_token[None, :]


@triton.jit
def scaled(acc, of_row, of_token, FLIP: tl.constexpr):
    """`acc` times a number per row and one per token, either of which may be None."""
    if of_row is not None:
        if FLIP:
            acc *= of_row[None, :]
        else:
            acc *= of_row[:, None]
    if of_token is not None:
        if FLIP:
            acc *= of_token[:, None]
        else:
            acc *= of_token[None, :]
    return acc


@triton.jit
def biased(acc, bias, FLIP: tl.constexpr):
    if bias is not None:
        if FLIP:
            acc += bias[None, :]
        else:
            acc += bias[:, None]
    return acc


@triton.jit
def activated(
    acc, ROWS: tl.constexpr, TOKENS: tl.constexpr, CLAMPED: tl.constexpr, LIMIT: tl.constexpr,
    ALPHA: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Interleaved gate and up → [TOKENS, ROWS / 2] if FLIP, else [ROWS / 2, TOKENS]."""
    if FLIP:
        runs = tl.permute(tl.reshape(acc, (TOKENS, ROWS // 16, 2, 8)), (0, 1, 3, 2))
        gate, up = tl.split(runs)
        gate = tl.reshape(gate, (TOKENS, ROWS // 2))
        up = tl.reshape(up, (TOKENS, ROWS // 2))
        return gated(gate, up, CLAMPED, LIMIT, ALPHA)
    else:
        return activation(acc, ROWS, TOKENS, CLAMPED, LIMIT, ALPHA)


@triton.jit
def arranged(column, UNIT: tl.constexpr):
    """Where a column of activations lies for 4-bit weights in units of UNIT; itself for others, and for units
    that are long enough as they are."""
    if UNIT == 0 or UNIT >= 4 * X_RUN:
        return column
    else:
        RUN: tl.constexpr = UNIT // 4
        in_unit = column % UNIT
        run = in_unit // RUN * (4 * X_RUN // UNIT) + column % (4 * X_RUN) // UNIT
        return column // (4 * X_RUN) * (4 * X_RUN) + run * RUN + column % RUN


@triton.jit
def store_tile(
    out, acc, first_of_token, column, live, there, FLIP: tl.constexpr, RAGGED: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """`acc` to out[first_of_token + column]; RAGGED: only columns that are `there`. KEEP: see
    _experts.eviction."""
    values = acc.to(out.dtype.element_ty)
    if FLIP:
        mask = live[:, None] & there[None, :] if RAGGED else live[:, None]
        tl.store(out + first_of_token[:, None] + column[None, :], values, mask=mask, eviction_policy=KEEP)
    else:
        mask = live[None, :] & there[:, None] if RAGGED else live[None, :]
        tl.store(out + first_of_token[None, :] + column[:, None], values, mask=mask, eviction_policy=KEEP)
