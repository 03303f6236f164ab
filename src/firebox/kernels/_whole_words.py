"""What _whole_rows.py does, for 4-bit weights: all columns of some rows in registers, two words to a number
of 32 bits; each code times the column of x that it stands for, in float32; each group's sum times its scale,
and the sum of these over a warp.

A tile is [B, columns]: B rows side by side that fill a program's threads, in chunks of a power of two
columns, of at most what a warp takes in one load. So each thread loads the columns of x that its words stand
for, and uses them again for each further such tile of its program; none waits for another thread until the
sum. Decoding E2M1 to float32 takes two instructions a weight, an integer one, and multiplication one, where
tensor cores take two and a product of which seven eighths are zeros (_expert_tiles.py, SPREAD); but nothing
is divided among programs and added up again. Where there is much to decode, that is not enough: on an H200
gpt-oss's experts take 26.5 µs so, and 25 in moe_gate_up_few.py and moe_down_few.py; an eighth of Kimi-K2.5's
12 and 20.

Codes are taken where they stand, as float32 below the normal ones, and x and the groups' scales make up: E2M1
comes out times 2⁻¹²⁶, an integer at bit p times 2ᵖ⁻¹⁴⁹, so that five of eight need no shift; its x is times
2¹⁰⁰⁻ᵖ. Of a group of integers, the zero point times the sum of x is taken off.
"""

from __future__ import annotations

import triton
import triton.language as tl

from firebox.formats.layouts import PER_WORD
from firebox.kernels._words import E2M1_LOWERED, factor_of_code, in_panels, sum_factors

BYTES_EACH = 16  # of words that a thread loads at once, or those of a group where that has fewer
SLACK = 4 / 3  # of a row's columns, the most that it may take in registers


def thread_columns(group: int) -> int:
    """Columns of a chunk that one thread loads."""
    return min(group, BYTES_EACH * 2)


def chunk_of(columns: int, group: int) -> int:
    """Columns of a chunk: the widest that leaves not too much empty, or else the one that leaves least."""
    sizes = [32 * thread_columns(group) >> shift for shift in range(5)]
    wide = (size for size in sizes if -(-columns // size) * size <= SLACK * columns)
    return next(wide, min(sizes, key=lambda size: -(-columns // size) * size))


def padded(columns: int, group: int) -> int:
    """Columns that a row takes in registers."""
    chunk = chunk_of(columns, group)
    return -(-columns // chunk) * chunk


def threads_of(columns: int, group: int) -> int:
    """Threads that share a row."""
    return chunk_of(columns, group) // thread_columns(group)


# ---- device code

PAIR = tl.constexpr(2 * PER_WORD)  # columns of a number of 32 bits
E2M1 = tl.constexpr(0x81C00000 - (1 << 32))  # sign and magnitude of a float32 times 2⁻¹²⁶
SIGN = tl.constexpr(-(1 << 31))
MAGNITUDE = tl.constexpr(0x01C00000)
LAST_CODES = tl.constexpr(0x00D800D8)  # as in _words.e2m1_asm
E2M1_LIFT = tl.constexpr(100)  # of x, as a power of two: LIFT
UPPER_BITS = tl.constexpr((16, 8, 12, 16))  # where an upper word's integers lie, but for the first shifted
DOWN = tl.constexpr(12)  # so far; a mantissa has 23 bits
LIFT_AT_0 = tl.constexpr(100)  # of x, as a power of two, for an integer at bit 0
INTEGER_SCALE = tl.constexpr(2.0**49)  # of integers as float32 times lifted x


@triton.jit
def part_of_words(
    w, row, FIRST: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, ALL: tl.constexpr,
    STORED: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """Pairs of words [B, SIZE / PAIR] of the columns FIRST … FIRST + SIZE. `w`, one pointer or [B, 1], is
    where matrices of ALL rows begin; `row`, a number or [B, 1], counts from there."""
    i = tl.arange(0, SIZE // PAIR)[None, :]
    pairs = w.to(tl.pointer_type(tl.int32), bitcast=True)
    place = pairs + in_panels(row, i, ALL, STORED // PAIR, PANEL // PAIR)
    place += in_panels(0, FIRST // PAIR, ALL, STORED // PAIR, PANEL // PAIR)
    if FIRST + SIZE > COLUMNS:
        return tl.load(place, mask=i < (STORED - FIRST) // PAIR, other=0, eviction_policy="evict_first")
    else:
        return tl.load(place, eviction_policy="evict_first")


@triton.jit
def part_of_scales(
    scale, row, FIRST: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, ALL: tl.constexpr,
    STORED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """The scales [B, SIZE / GROUP] of the same columns, as stored; packed, [B, SIZE / UNIT] int32, in units
    of several groups."""
    if UNIT > GROUP:
        unit = tl.arange(0, SIZE // UNIT)[None, :]
        packed = scale.to(tl.pointer_type(tl.int32), bitcast=True) + (FIRST // UNIT + unit) * ALL + row
        return tl.load(packed, mask=unit < (STORED - FIRST) // UNIT, other=0)
    else:
        g = tl.arange(0, SIZE // GROUP)[None, :]
        place = scale + in_panels(row, g, ALL, GROUPS, PANEL // GROUP)
        place += in_panels(0, FIRST // GROUP, ALL, GROUPS, PANEL // GROUP)
        if FIRST + SIZE > COLUMNS:
            nothing: tl.constexpr = 0.0 if scale.dtype.element_ty.is_floating() else 0
            return tl.load(place, mask=g < (COLUMNS - FIRST) // GROUP, other=nothing)
        else:
            return tl.load(place)


@triton.jit
def times_powers(both, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Pairs of bf16 in an int32, times 2^FIRST and 2^SECOND. Minus zero is added, which changes nothing:
    multiplication alone is an instruction from sm_90 on."""
    powers = tl.full(both.shape, (127 + FIRST) << 7 | (127 + SECOND) << 23, tl.int32)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 none; mov.b32 none, 0x80008000; fma.rn.bf16x2 $0, $1, $2, none; }", "=r,r,r",
        [both, powers], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def columns_of_code(
    x, J: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    FORMAT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """What code J of the first and of the second word of each pair meets, two of [B, SIZE / PAIR] float32,
    times powers of two; `x` [B, 1] points at rows. ASM: they are bf16."""
    RUN: tl.constexpr = UNIT // PAIR  # pairs of columns in order
    i = tl.arange(0, SIZE // PAIR)[None, :]
    at = i // RUN * (4 * RUN) + i % RUN
    live = at < (COLUMNS - FIRST) // 2 - J * RUN
    INTEGERS: tl.constexpr = FORMAT == "int4_group" or FORMAT == "int4_zero"
    UP: tl.constexpr = LIFT_AT_0 - 4 * J if INTEGERS else E2M1_LIFT
    UP_2: tl.constexpr = LIFT_AT_0 - UPPER_BITS[J] if INTEGERS else E2M1_LIFT
    if ASM:
        pairs_of_x = x.to(tl.pointer_type(tl.int32), bitcast=True) + at
        both = tl.load(pairs_of_x + (FIRST // 2 + J * RUN), mask=live, other=0)
        both = times_powers(both, UP, UP_2)
        return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    else:
        at = 2 * at + (FIRST + 2 * J * RUN)
        first = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        second = tl.load(x + at + 1, mask=live, other=0.0).to(tl.float32)
        return first * 2.0**UP, second * 2.0**UP_2


@triton.jit
def sum_of_columns(x, FIRST: tl.constexpr):
    """x as it was before `columns_of_code` lifted it for integers, added up over the codes of each pair."""
    total = x[FIRST] * 2.0**-LIFT_AT_0 + x[FIRST + 1] * 2.0 ** (UPPER_BITS[0] - LIFT_AT_0)
    for j in tl.static_range(1, 4):
        total += x[FIRST + 2 * j] * 2.0 ** (4 * j - LIFT_AT_0)
        total += x[FIRST + 2 * j + 1] * 2.0 ** (UPPER_BITS[j] - LIFT_AT_0)
    return total


@triton.jit
def shifted(bits, LEFT: tl.constexpr):
    """`bits` · 2^LEFT as an unsigned number; what comes in from the left is anything."""
    if LEFT > 0:
        return bits << LEFT
    elif LEFT < 0:
        return bits >> -LEFT
    else:
        return bits


@triton.jit
def value_of(pairs, J: tl.constexpr, WORD: tl.constexpr, FORMAT: tl.constexpr):
    """Code J of the first or the second (WORD 0 or 1) word of each pair, float32; see above."""
    UP: tl.constexpr = 16 - 16 * WORD  # to the upper half
    if FORMAT == "int4_group" or FORMAT == "int4_zero":
        if WORD == 0:
            bits = pairs & (15 << 4 * J)
        elif J == 0:
            bits = pairs & (15 << UPPER_BITS[0])
        else:
            bits = (pairs >> DOWN) & (15 << UPPER_BITS[J])
    elif FORMAT == "mxfp4_nibbles" or FORMAT == "nvfp4_nibbles":
        bits = (shifted(pairs, UP + 12 - 4 * J) & SIGN) | (shifted(pairs, UP + 6 - 4 * J) & MAGNITUDE)
    elif J == 3:
        bits = shifted(((pairs >> 7) & LAST_CODES) * 2081, UP) & E2M1
    else:
        bits = shifted(pairs, UP + 3 * J) & E2M1
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def products_by_code(pairs, packed, x, FIRST: tl.constexpr, UNIT: tl.constexpr, FORMAT: tl.constexpr):
    """As products_by_group in units of several groups, where a scale is a code's: [B, SIZE / (4 · PAIR)], the
    sums of what a thread loads at once, times E2M1_LOWERED."""
    B: tl.constexpr = pairs.shape[0]
    AT_ONCE: tl.constexpr = pairs.shape[1] // 4
    UNITS: tl.constexpr = packed.shape[1]
    total = tl.zeros((B, AT_ONCE), tl.float32)
    for j in tl.static_range(4):
        products = value_of(pairs, j, 0, FORMAT) * x[FIRST + 2 * j]
        products += value_of(pairs, j, 1, FORMAT) * x[FIRST + 2 * j + 1]
        factor = tl.broadcast_to(factor_of_code(packed, j, True)[:, :, None], (B, UNITS, AT_ONCE // UNITS))
        total += tl.sum(tl.reshape(products, (B, AT_ONCE, 4)), axis=2) * tl.reshape(factor, (B, AT_ONCE))
    return total


@triton.jit
def products_by_group(
    pairs, stored, x, FIRST: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """scale · Σ code · x of each group of a chunk: `pairs` [B, n], `stored` [B, groups] → the shape of
    `stored`, float32. `x`: of all chunks, FIRST where this one's begin."""
    B: tl.constexpr = pairs.shape[0]
    EACH: tl.constexpr = GROUP // PAIR
    GROUPS: tl.constexpr = pairs.shape[1] // EACH
    products = value_of(pairs, 0, 0, FORMAT) * x[FIRST]
    products += value_of(pairs, 0, 1, FORMAT) * x[FIRST + 1]
    for j in tl.static_range(1, 4):
        products += value_of(pairs, j, 0, FORMAT) * x[FIRST + 2 * j]
        products += value_of(pairs, j, 1, FORMAT) * x[FIRST + 2 * j + 1]
    of_group = tl.sum(tl.reshape(products, (B, GROUPS, EACH)), axis=2)
    if FORMAT == "int4_group" or FORMAT == "int4_zero":
        zero = 8.0
        if FORMAT == "int4_zero":
            zero = -128.0 - (stored & -65536).to(tl.float32, bitcast=True)
        of_x = tl.sum(tl.reshape(sum_of_columns(x, FIRST), (B, GROUPS, EACH)), axis=2)
        of_group = of_group * INTEGER_SCALE - zero * of_x
    return of_group * sum_factors(stored, FORMAT, True)


@triton.jit
def row_of_words(
    w, row, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ALL: tl.constexpr, STORED: tl.constexpr,
    PANEL: tl.constexpr,
):  # fmt: skip
    """`part_of_words` of every chunk."""
    found = ()
    for first in tl.static_range(0, COLUMNS, CHUNK):
        found = found + (part_of_words(w, row, first, CHUNK, COLUMNS, ALL, STORED, PANEL),)
    return found


@triton.jit
def row_of_scales(
    scale, row, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ALL: tl.constexpr, STORED: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """`part_of_scales` of every chunk."""
    found = ()
    for first in tl.static_range(0, COLUMNS, CHUNK):
        of_chunk = part_of_scales(scale, row, first, CHUNK, COLUMNS, ALL, STORED, GROUPS, GROUP, UNIT, PANEL)
        found = found + (of_chunk,)
    return found


@triton.jit
def columns_of_x(
    x, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr, FORMAT: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """`columns_of_code` of every chunk and code, eight of each chunk."""
    found = ()
    for first in tl.static_range(0, COLUMNS, CHUNK):
        for j in tl.static_range(4):
            found = found + columns_of_code(x, j, first, CHUNK, COLUMNS, UNIT, FORMAT, ASM)
    return found


@triton.jit
def products(
    pairs, stored, x, FIRST: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """Of a chunk, however its scales go."""
    if UNIT > GROUP:
        return products_by_code(pairs, stored, x, FIRST, UNIT, FORMAT)
    else:
        return products_by_group(pairs, stored, x, FIRST, GROUP, FORMAT)


@triton.jit
def words_products(
    words, stored, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """W · x of each of the ROWS that `row_of_words` and `row_of_scales` loaded one after the other, [B] each;
    `x` from `columns_of_x`. Chunk by chunk: of x a thread has no more at a time."""
    CHUNKS: tl.constexpr = (COLUMNS + CHUNK - 1) // CHUNK
    totals = ()
    for row in tl.static_range(ROWS):
        of_chunk = products(words[row * CHUNKS], stored[row * CHUNKS], x, 0, GROUP, UNIT, FORMAT)
        totals = totals + (of_chunk,)
    for c in tl.static_range(1, CHUNKS):
        further = ()
        for row in tl.static_range(ROWS):
            of_chunk = products(
                words[row * CHUNKS + c], stored[row * CHUNKS + c], x, 8 * c, GROUP, UNIT, FORMAT
            )  # fmt: skip
            further = further + (totals[row] + of_chunk,)
        totals = further
    sums = ()
    for row in tl.static_range(ROWS):
        total = tl.sum(totals[row], axis=1)
        sums = sums + (total * (1 / E2M1_LOWERED) if UNIT > GROUP else total,)
    return sums
