"""What the kernels of one token share: rows of all columns in registers, in up to three parts whose sizes are
powers of two, multiplied by x in float32 and summed over a program's threads."""

from __future__ import annotations

import triton
import triton.language as tl


def parts(columns: int) -> dict[str, int]:
    """C0, C1 and C2, 0 for none: 5,120 is 4,096 and 1,024, 2,880 is 2,048, 512 and 512 of which 320 count."""
    sizes, left = [0, 0, 0], columns
    for part in range(3):
        if left:
            power = 1 << (left.bit_length() - 1)
            sizes[part] = power if part < 2 else int(triton.next_power_of_2(left))
            left -= min(left, sizes[part])
    return dict(zip(("C0", "C1", "C2"), sizes, strict=True))


def padded(columns: int) -> int:
    """Columns that a row takes in registers."""
    return sum(parts(columns).values())


# ---- device code


@triton.jit
def part_of_rows(w, at, FIRST: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns FIRST … FIRST + SIZE of the rows that begin at `at` [ROWS]: [ROWS, SIZE], as stored."""
    column = FIRST + tl.arange(0, SIZE)[None, :]
    place = w + at[:, None] + column
    if FIRST + SIZE > COLUMNS:
        return tl.load(place, mask=column < COLUMNS, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(place, eviction_policy="evict_first")


@triton.jit
def part_of_x(x, FIRST: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """The same columns of x, [SIZE], as stored."""
    column = FIRST + tl.arange(0, SIZE)
    return tl.load(x + column, mask=column < COLUMNS, other=0.0)


@triton.jit
def row_of_x(x, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, COLUMNS: tl.constexpr):
    """`part_of_x` of each part that there is."""
    found = (part_of_x(x, 0, C0, COLUMNS),)
    if C1 > 0:
        found = found + (part_of_x(x, C0, C1, COLUMNS),)
    if C2 > 0:
        found = found + (part_of_x(x, C0 + C1, C2, COLUMNS),)
    return found


@triton.jit
def normed_row(x, gains, PARTS: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """kernels/rms_norm.py of a row, rounded as there: `x` and `gains` as `row_of_x` has them."""
    squares = tl.sum(x[0].to(tl.float32) * x[0].to(tl.float32))
    for part in tl.static_range(1, PARTS):
        squares += tl.sum(x[part].to(tl.float32) * x[part].to(tl.float32))
    factor = tl.rsqrt(squares / COLUMNS + EPS)
    found = ()
    for part in tl.static_range(PARTS):
        rounded = (x[part].to(tl.float32) * factor).to(DTYPE).to(tl.float32)
        found = found + ((rounded * gains[part].to(tl.float32)).to(DTYPE),)
    return found


@triton.jit
def part_product(tile, xs, scale_at, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ tile · xs in float32 over a part's columns, [ROWS]. `scale_at`: where the scales of each row's blocks
    begin [ROWS], or None."""
    ROWS: tl.constexpr = tile.shape[0]
    SIZE: tl.constexpr = tile.shape[1]
    products = tile.to(tl.float32) * xs.to(tl.float32)[None, :]
    if scale_at is None:
        return tl.sum(products, axis=1)
    else:
        BLOCKS: tl.constexpr = SIZE // 128
        block = FIRST // 128 + tl.arange(0, BLOCKS)[None, :]
        scales = tl.load(scale_at[:, None] + block, mask=block < COLUMNS // 128, other=0.0)
        of_block = tl.sum(tl.reshape(products, (ROWS, BLOCKS, 128)), axis=2)
        return tl.sum(of_block * scales, axis=1)
