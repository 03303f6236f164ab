"""From 4-bit words to the numbers that a tensor instruction multiplies: device code that the linear and the
expert kernels share. How a word's four codes lie is said in formats/layouts.py.

`ASM` decodes two words at a time with bit operations on packed pairs; without it the same in plain Triton,
for the interpreter and for float16. E2M1 codes come out of `ASM` times 2⁻¹²⁶, and the group scale brings the
factor back; where scales multiply sums, x does its part of that (`lifted`). A zero point is the constant that
decoding an integer subtracts anyway, so it costs no instruction: bf16 holds 128 + code and 128 + zero
exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

LIFT = tl.constexpr(2.0**100)  # of x; see `lifted`
E2M1_LOWERED = tl.constexpr(2.0**-26)  # codes times 2⁻¹²⁶ times `lifted` x
EXPONENT, BF16_EXPONENT = tl.constexpr(0x7F800000), tl.constexpr(0x7F80)


@triton.jit
def int4_asm(words):
    """128 + code is a bf16 with the code in its last bits."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, d, one, minus;
        mov.b32 one, 0x3F803F80; mov.b32 minus, 0xC308C308;
        lop3.b32 a, $4, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 b, $4, 4; lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 c, $4, 8; lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 d, $4, 12; lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $0, a, one, minus; fma.rn.bf16x2 $1, b, one, minus;
        fma.rn.bf16x2 $2, c, one, minus; fma.rn.bf16x2 $3, d, one, minus; }""",
        "=r,=r,=r,=r,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def e2m1_asm(words):
    """Sign to bit 15, magnitude to bits 8 … 6: the value times 2⁻¹²⁶, also where it is subnormal. The last
    code's bits, which three shifts would bring there, one multiplication does: 2,081 = 2¹¹ + 2⁵ + 1."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a;
        and.b32 $0, $4, 0x81C081C0;
        shl.b32 a, $4, 3; and.b32 $1, a, 0x81C081C0;
        shl.b32 a, $4, 6; and.b32 $2, a, 0x81C081C0;
        shr.u32 a, $4, 7; and.b32 a, a, 0x00D800D8; mul.lo.u32 a, a, 2081; and.b32 $3, a, 0x81C081C0; }""",
        "=r,=r,=r,=r,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def e2m1_nibbles_asm(words):
    """As e2m1_asm, for codes that lie as nibbles: three instructions more for eight of them."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b;
        shl.b32 a, $4, 12; and.b32 a, a, 0x80008000;
        shl.b32 b, $4, 6; lop3.b32 $0, b, 0x01C001C0, a, 0xEA;
        shl.b32 a, $4, 8; and.b32 a, a, 0x80008000;
        shl.b32 b, $4, 2; lop3.b32 $1, b, 0x01C001C0, a, 0xEA;
        shl.b32 a, $4, 4; and.b32 a, a, 0x80008000;
        shr.u32 b, $4, 2; lop3.b32 $2, b, 0x01C001C0, a, 0xEA;
        and.b32 a, $4, 0x80008000;
        shr.u32 b, $4, 6; lop3.b32 $3, b, 0x01C001C0, a, 0xEA; }""",
        "=&r,=&r,=&r,=&r,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _e2m1_value(sign, magnitude, DTYPE: tl.constexpr):
    exponent = magnitude >> 1
    half_steps = tl.where(exponent == 0, magnitude & 1, 2 + (magnitude & 1))
    value = half_steps.to(tl.float32) * 0.5
    value *= tl.where(exponent == 3, 4.0, tl.where(exponent == 2, 2.0, 1.0))
    return tl.where(sign != 0, -value, value).to(DTYPE)


@triton.jit
def e2m1_plain(words, DTYPE: tl.constexpr):
    w = words.to(tl.int32)
    return (
        _e2m1_value(w >> 15 & 1, w >> 6 & 7, DTYPE),
        _e2m1_value(w >> 12 & 1, w >> 3 & 7, DTYPE),
        _e2m1_value(w >> 9 & 1, w & 7, DTYPE),
        _e2m1_value(w >> 11 & 1, (w >> 8 & 4) | (w >> 13 & 3), DTYPE),
    )


@triton.jit
def e2m1_nibbles_plain(words, DTYPE: tl.constexpr):
    w = words.to(tl.int32)
    return (
        _e2m1_value(w >> 3 & 1, w & 7, DTYPE),
        _e2m1_value(w >> 7 & 1, w >> 4 & 7, DTYPE),
        _e2m1_value(w >> 11 & 1, w >> 8 & 7, DTYPE),
        _e2m1_value(w >> 15 & 1, w >> 12 & 7, DTYPE),
    )


@triton.jit
def int4_plain(words, DTYPE: tl.constexpr):
    w = words.to(tl.int32)
    return (
        ((w & 15) - 8).to(DTYPE),
        ((w >> 4 & 15) - 8).to(DTYPE),
        ((w >> 8 & 15) - 8).to(DTYPE),
        ((w >> 12 & 15) - 8).to(DTYPE),
    )


@triton.jit
def int4_zero_asm(words, minus):
    """128 + code is a bf16 with the code in its last bits; `minus` is −(128 + zero)."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, d, one;
        mov.b32 one, 0x3F803F80;
        lop3.b32 a, $4, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 b, $4, 4; lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 c, $4, 8; lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 d, $4, 12; lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $0, a, one, $5; fma.rn.bf16x2 $1, b, one, $5;
        fma.rn.bf16x2 $2, c, one, $5; fma.rn.bf16x2 $3, d, one, $5; }""",
        "=&r,=&r,=&r,=&r,r,r",
        [words, minus],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def int4_zero_plain(words, minus, DTYPE: tl.constexpr):
    w = words.to(tl.int32)
    from_128 = minus.to(tl.float32) + 128.0
    return (
        ((w & 15).to(tl.float32) + from_128).to(DTYPE),
        ((w >> 4 & 15).to(tl.float32) + from_128).to(DTYPE),
        ((w >> 8 & 15).to(tl.float32) + from_128).to(DTYPE),
        ((w >> 12 & 15).to(tl.float32) + from_128).to(DTYPE),
    )


@triton.jit
def decode(words, minus, FORMAT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Words [ROWS, DEPTH / 4] → four matrices of the same shape, without their group scales. `minus`: as
    `scales_of` returned it."""
    if FORMAT == "int4_zero":
        if ASM:
            return int4_zero_asm(words, minus)
        else:
            return int4_zero_plain(words, minus, DTYPE)
    elif FORMAT == "int4_group":
        if ASM:
            return int4_asm(words)
        else:
            return int4_plain(words, DTYPE)
    elif FORMAT == "mxfp4_nibbles" or FORMAT == "nvfp4_nibbles":
        if ASM:
            return e2m1_nibbles_asm(words)
        else:
            return e2m1_nibbles_plain(words, DTYPE)
    else:
        if ASM:
            return e2m1_asm(words)
        else:
            return e2m1_plain(words, DTYPE)


@triton.jit
def in_panels(row, column, ALL: tl.constexpr, COLUMNS: tl.constexpr, PANEL: tl.constexpr):
    """Where a number of a matrix of ALL rows and COLUMNS columns lies; PANEL 0: row by row."""
    if PANEL == 0:
        return row * COLUMNS + column
    else:
        return column // PANEL * (ALL * PANEL) + row * PANEL + column % PANEL


@triton.jit
def group_scales(
    scale, first, live, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
    TOGETHER: tl.constexpr = 0, ALL: tl.constexpr = 0,
):  # fmt: skip
    """The scales of DEPTH columns from `first` on, for each word [ROWS, DEPTH / 4]. `scale` points at rows
    [ROWS, 1]; `live` masks groups that are not there (None: all are). TOGETHER: so many of a row lie next to
    each other, and then those of the next of ALL rows (0: all of a row do).

    With ASM the codes are times 2⁻¹²⁶. E8M0 takes that back exactly: its exponent plus 126. NVFP4's scale, up
    to 448, would overflow, so it takes back 2¹¹⁸, and the row's scale the last 2⁸."""
    group = in_panels(0, first // GROUP + tl.arange(0, DEPTH // GROUP), ALL, 0, TOGETHER)
    if live is None:
        stored = tl.load(scale + group[None, :])
    else:
        stored = tl.load(scale + group[None, :], mask=live[None, :], other=0.0)
    if FORMAT == "mxfp4" or FORMAT == "mxfp4_nibbles":
        if ASM:
            factor = ((stored.to(tl.int16) + 126) << 7).to(tl.bfloat16, bitcast=True)
        else:
            factor = tl.exp2(stored.to(tl.float32) - 127.0).to(DTYPE)
    else:
        factor = stored.to(tl.float32).to(DTYPE)
        if (FORMAT == "nvfp4" or FORMAT == "nvfp4_nibbles") and ASM:
            factor = (stored.to(tl.float32) * 3.3230699894622253e35).to(DTYPE)  # 2¹¹⁸
    wide = tl.broadcast_to(factor[:, :, None], (ROWS, DEPTH // GROUP, GROUP // 4))
    return tl.reshape(wide, (ROWS, DEPTH // 4))


@triton.jit
def sum_factors(stored, FORMAT: tl.constexpr, ASM: tl.constexpr):
    """Group scales as they are `stored` → what multiplies a group's sum of codes times `lifted` x, float32.
    With ASM an E2M1 sum is times 2⁻¹²⁶ · LIFT."""
    if FORMAT == "mxfp4" or FORMAT == "mxfp4_nibbles":
        if ASM:
            return ((stored.to(tl.int32) + 26) << 23).to(tl.float32, bitcast=True)
        else:
            return tl.exp2(stored.to(tl.float32) - 127.0)
    elif FORMAT == "int4_zero":
        return (stored << 16).to(tl.float32, bitcast=True)
    elif (FORMAT == "nvfp4" or FORMAT == "nvfp4_nibbles") and ASM:
        return stored.to(tl.float32) * 67108864.0  # 2²⁶
    else:
        return stored.to(tl.float32)


@triton.jit
def scale_of_code(packed, J: tl.constexpr):
    """The E8M0 scale of code J in units, where four lie in an int32, as float32."""
    return tl.exp2(((packed >> 8 * J) & 255).to(tl.float32) - 127.0)


@triton.jit
def factor_of_code(packed, J: tl.constexpr, ASM: tl.constexpr):
    """The same, for sums: E8M0 is the exponent of a float32."""
    if ASM:
        bits = packed >> 1 if J == 3 else packed << 23 - 8 * J
        return (bits & EXPONENT).to(tl.float32, bitcast=True)
    else:
        return scale_of_code(packed, J)


@triton.jit
def scale_for_weights(packed, J: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The same, for weights, as `group_scales` has them. No scale is above 128, so the exponents of all four
    are raised at once."""
    if ASM:
        raised = packed + 126 * 0x01010101
        bits = raised << 7 if J == 0 else raised >> 8 * J - 7
        return (bits & BF16_EXPONENT).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return scale_of_code(packed, J).to(DTYPE)


@triton.jit
def scales_of_codes(packed, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """`scale_for_weights` of a word's four codes, each of the shape of `packed`."""
    s0 = scale_for_weights(packed, 0, DTYPE, ASM)
    s1 = scale_for_weights(packed, 1, DTYPE, ASM)
    s2 = scale_for_weights(packed, 2, DTYPE, ASM)
    return s0, s1, s2, scale_for_weights(packed, 3, DTYPE, ASM)


@triton.jit
def spread_scales(
    scale, first, live, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPREAD: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, FORMAT: tl.constexpr, ASM: tl.constexpr, TOGETHER: tl.constexpr = 0,
    ALL: tl.constexpr = 0,
):  # fmt: skip
    """float32 [ROWS, TOKENS · SPREAD]: for each token the scales of SPREAD groups from the column `first` on.
    `live` [SPREAD], TOGETHER and ALL as in `group_scales`; in units `scale` points at rows' packed ones."""
    if UNIT > GROUP:
        scale = scale.to(tl.pointer_type(tl.uint8), bitcast=True)
    group = in_panels(0, first // GROUP + tl.arange(0, SPREAD), ALL, 0, TOGETHER)
    if live is None:
        stored = tl.load(scale + group[None, :])
    else:
        stored = tl.load(
            scale + group[None, :], mask=live[None, :], other=0 if FORMAT == "int4_zero" else 0.0
        )
    factor = sum_factors(stored, FORMAT, ASM)
    wide = tl.broadcast_to(factor[:, None, :], (ROWS, TOKENS, SPREAD))
    return tl.reshape(wide, (ROWS, TOKENS * SPREAD))


@triton.jit
def lifted(x, FORMAT: tl.constexpr, ASM: tl.constexpr):
    """`x` times LIFT where ASM leaves codes times 2⁻¹²⁶, so that float32 holds their products."""
    if ASM and (FORMAT != "int4_group" and FORMAT != "int4_zero"):
        return x * LIFT
    else:
        return x


@triton.jit
def scales_and_zeros(
    scale, first, live, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    TOGETHER: tl.constexpr = 0, ALL: tl.constexpr = 0,
):  # fmt: skip
    """As group_scales, for int4_zero: two of [ROWS, DEPTH / 4], the scales and −(128 + zero)."""
    group = in_panels(0, first // GROUP + tl.arange(0, DEPTH // GROUP), ALL, 0, TOGETHER)
    if live is None:
        stored = tl.load(scale + group[None, :])
    else:
        stored = tl.load(scale + group[None, :], mask=live[None, :], other=0)
    factor = (stored << 16).to(tl.float32, bitcast=True).to(DTYPE)
    minus = (stored & -65536).to(tl.float32, bitcast=True).to(DTYPE)
    wide = tl.broadcast_to(factor[:, :, None], (ROWS, DEPTH // GROUP, GROUP // 4))
    wide_minus = tl.broadcast_to(minus[:, :, None], (ROWS, DEPTH // GROUP, GROUP // 4))
    return tl.reshape(wide, (ROWS, DEPTH // 4)), tl.reshape(wide_minus, (ROWS, DEPTH // 4))


@triton.jit
def scales_of(
    scale, first, live, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr, TOGETHER: tl.constexpr = 0, ALL: tl.constexpr = 0,
):  # fmt: skip
    """The scales of DEPTH columns for each word, and −(128 + zero) (the same again where there are none).
    `live`, TOGETHER and ALL as in `group_scales`."""
    if FORMAT == "int4_zero":
        return scales_and_zeros(scale, first, live, ROWS, DEPTH, GROUP, DTYPE, TOGETHER, ALL)
    else:
        wide = group_scales(scale, first, live, ROWS, DEPTH, GROUP, FORMAT, DTYPE, ASM, TOGETHER, ALL)
        return wide, wide
