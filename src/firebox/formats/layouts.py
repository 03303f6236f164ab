"""How expert weights lie in GPU memory. Checkpoints store what quantisers wrote; kernels want each thread's
numbers next to each other, so weights are arranged once, when they are loaded.

    gate_up   [experts, 2 · inter, …]   runs of 8 gate rows and 8 up rows alternate, so that a matrix
                                        instruction leaves a gate and its up in the same thread
    down      [experts, hidden, …]      as it is
    words     [rows, columns / 4]       uint16, four 4-bit codes to a word: a group of 32 columns is 8 words,
                                        and word i holds columns i, i + 8, i + 16, i + 24 of its group (of 16:
                                        4 words; i, i + 4, …), so that each of the four is a run of columns
                                        (a unit); of MXFP4 in panels of 128 a unit is a panel, its word i has
                                        columns i, i + 32, i + 64, i + 96: a code's are one group's, whose
                                        scale can then multiply sums
      int4    code j in bits 4j … 4j + 3, stored plus 8
      e2m1    sign and magnitude of code j where one shift brings them to a bf16's sign and top exponent bits,
              or, of the last, one multiplication:
              j   sign   magnitude
              0   15      8  7  6
              1   12      5  4  3
              2    9      2  1  0
              3   11     10 14 13
      nibbles e2m1 codes in bits 4j … 4j + 3 as they are, for GPUs whose tensor cores multiply them: read as
              bytes, a row is what a block-scaled product takes
    activations                         for many tokens: of 64 columns first all that code 0 stands for, then
                                        those of code 1, …, so that each code's are 16 in a row; in units of
                                        64 and more they are that as they stand
    panels  [panels, rows, …]           4-bit words and their group scales, if so chosen: all rows of 128
                                        columns together (of 64 or 32 where else too much of the last panel
                                        were empty), so that what a step of a kernel reads is one run of
                                        bytes, zeros behind the last column; groups are not padded otherwise
    group scales [rows, groups]         rows padded to a multiple of 16 groups, so that they load in one piece
    scales with zero points             one int32 a group: the scale as bf16 in the low half, −(128 + zero) as
                                        bf16 in the high half, which is exact
"""

from __future__ import annotations

import torch

RUN = 8  # gate rows, or up rows, one behind the other
PER_WORD = 4
GROUPS_PADDED = 16
ARRANGED = 64  # columns of activations that are put in another order together
PANELS = (128, 64, 32)  # columns
PANELS_EMPTY = 1 / 20  # of the columns, the most that may be added
INT4_BITS = tuple(tuple(range(4 * j + 3, 4 * j - 1, -1)) for j in range(PER_WORD))
E2M1_BITS = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (11, 10, 14, 13))


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gate` and `up` [..., inter, n], inter a multiple of 8 → [..., 2 · inter, n], runs of 8 in turn."""
    runs = [half.unflatten(-2, (-1, RUN)) for half in (gate, up)]
    return torch.stack(runs, dim=-3).flatten(-4, -2)


def separate(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `interleave`."""
    runs = gate_up.unflatten(-2, (-1, 2, RUN))
    return runs[..., 0, :, :].flatten(-3, -2), runs[..., 1, :, :].flatten(-3, -2)


def whole_units(columns: int, unit: int) -> int:
    """So many columns in whole units."""
    return -(-columns // unit) * unit


def pack_words(codes: torch.Tensor, unit: int, bits: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """`codes` [..., columns] of 0 … 15 → uint16 words [..., columns / 4] of whole units, zeros behind the
    last column. `bits`: where the bits of each word's four codes go, highest first."""
    codes = codes.to(torch.int32)
    if missing := -codes.shape[-1] % unit:
        codes = torch.nn.functional.pad(codes, (0, missing))
    parts = codes.unflatten(-1, (-1, PER_WORD, unit // PER_WORD))
    words = torch.zeros_like(parts[..., 0, :])
    for code, places in enumerate(bits):
        for bit, place in zip((3, 2, 1, 0), places, strict=True):
            words |= (parts[..., code, :] >> bit & 1) << place
    return words.flatten(-2).to(torch.int16).view(torch.uint16)


def unpack_words(words: torch.Tensor, unit: int, bits: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """The inverse of `pack_words`: int32 codes [..., columns], with the zeros."""
    of_unit = words.view(torch.int16).to(torch.int32).unflatten(-1, (-1, unit // PER_WORD))
    codes = []
    for places in bits:
        code = torch.zeros_like(of_unit)
        for bit, place in zip((3, 2, 1, 0), places, strict=True):
            code |= (of_unit >> place & 1) << bit
        codes.append(code)
    return torch.stack(codes, dim=-2).flatten(-3)


def bits_of_columns(columns: int, unit: int, bits: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """uint16 [whole units / 4]: the bits of each word that hold one of so many columns."""
    return pack_words(torch.full((columns,), 15), unit, bits)


def arranged_columns(columns: int, group: int) -> torch.Tensor:
    """For 4-bit weights in groups of `group`: which column of activations lies at each place [columns]
    int64."""
    if group >= ARRANGED:
        return torch.arange(columns)
    places = torch.arange(columns).view(-1, ARRANGED // group, PER_WORD, group // PER_WORD)
    return places.transpose(1, 2).flatten()


def panel_columns(columns: int, group: int) -> int:
    """Columns of a panel of a matrix that has so many, in groups of `group`: the most that leave little of
    the last panel empty. 0 where there can be none."""
    fitting = (wide for wide in PANELS if wide % group == 0)
    return next((wide for wide in fitting if -columns % wide <= columns * PANELS_EMPTY), 0)


def to_panels(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[..., rows, n] → [..., panels, rows, width], zeros behind the n of the last panel."""
    if missing := -rows.shape[-1] % width:
        rows = torch.cat((rows, rows.new_zeros(*rows.shape[:-1], missing)), -1)
    return torch.unflatten(rows, -1, (-1, width)).transpose(-3, -2).contiguous()


def from_panels(panels: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_panels`, with the zeros."""
    return panels.transpose(-3, -2).flatten(-2)


def pad_groups(scales: torch.Tensor) -> torch.Tensor:
    """`scales` [..., groups] → the same with zeros behind, up to a multiple of 16 groups."""
    missing = -scales.shape[-1] % GROUPS_PADDED
    if missing == 0:
        return scales.contiguous()
    # As bytes: not every type can be joined on every device.
    bytes_of = scales.contiguous().view(torch.uint8)
    padding = bytes_of.new_zeros(*scales.shape[:-1], missing * scales.itemsize)
    return torch.cat((bytes_of, padding), dim=-1).view(scales.dtype)


def pack_zeros(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """`scales` [..., groups], rounded to bf16, and integer `zeros` of 0 … 127, the same shape → int32 of
    both, the same shape."""
    halves = torch.stack((scales.bfloat16(), (-128 - zeros).bfloat16()), dim=-1)
    return halves.view(torch.int32).squeeze(-1)


def unpack_zeros(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack_zeros`, both in float32."""
    halves = packed.contiguous().view(torch.bfloat16).unflatten(-1, (-1, 2)).float()
    return halves[..., 0], -128 - halves[..., 1]
