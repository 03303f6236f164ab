"""Arranging expert weights for the GPU loses nothing, and puts every number where the kernels look for it."""

from __future__ import annotations

import pytest
import torch

from firebox.formats.layouts import (
    E2M1_BITS,
    INT4_BITS,
    bits_of_columns,
    from_panels,
    interleave,
    pack_words,
    pad_groups,
    panel_columns,
    separate,
    to_panels,
    unpack_words,
    whole_units,
)


def test_interleaved_rows_stand_in_runs_of_eight() -> None:
    gate = torch.arange(24).view(1, 24, 1).expand(2, 24, 3)
    both = interleave(gate, gate + 100)
    assert both.shape == (2, 48, 3)
    wanted = [*range(8), *range(100, 108), *range(8, 16), *range(108, 116), *range(16, 24), *range(116, 124)]
    assert both[1, :, 2].tolist() == wanted
    assert all(
        torch.equal(found, half) for found, half in zip(separate(both), (gate, gate + 100), strict=True)
    )


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("bits", [INT4_BITS, E2M1_BITS], ids=["int4", "e2m1"])
def test_words_hold_every_code(group: int, bits: tuple[tuple[int, ...], ...]) -> None:
    codes = torch.randint(0, 16, (3, 5, 4 * group), generator=torch.Generator().manual_seed(0))
    codes[0, 0, :16] = torch.arange(16)
    words = pack_words(codes, group, bits)
    assert (words.dtype, words.shape) == (torch.uint16, (3, 5, group))
    assert torch.equal(unpack_words(words, group, bits), codes.int())
    assert sorted(place for places in bits for place in places) == list(range(16))


def test_a_word_holds_columns_a_quarter_of_its_group_apart() -> None:
    codes = torch.zeros(1, 64, dtype=torch.int32)
    codes[0, 32 + 5 + 16] = 0b1010  # word 5 of the second group of 32, its third code
    (word,) = pack_words(codes, 32, E2M1_BITS)[0, 8 + 5 : 8 + 6].view(torch.int16).tolist()
    assert word == (1 << 9) | (1 << 1)  # sign at 9, magnitude 010 at 2 … 0
    (word,) = pack_words(codes, 32, INT4_BITS)[0, 8 + 5 : 8 + 6].view(torch.int16).tolist()
    assert word == 0b1010 << 8


def test_words_of_a_unit_that_is_not_full_hold_zeros_behind_the_last_column() -> None:
    codes = torch.randint(1, 16, (2, 192), generator=torch.Generator().manual_seed(0))
    words = pack_words(codes, 128, E2M1_BITS)
    assert words.shape == (2, 64) and whole_units(192, 128) == 256
    found = unpack_words(words, 128, E2M1_BITS)
    assert torch.equal(found[:, :192], codes.int()) and not found[:, 192:].any()
    # the last unit's words have their first two codes
    live = bits_of_columns(192, 128, E2M1_BITS)[32:].view(torch.int16)
    assert set(live.tolist()) == {sum(1 << place for places in E2M1_BITS[:2] for place in places) - (1 << 16)}
    assert not (words[:, 32:].view(torch.int16) & ~live).any()


@pytest.mark.parametrize(("groups", "padded"), [(16, 16), (90, 96), (1, 16)])
def test_padding_adds_zeros_behind(groups: int, padded: int) -> None:
    scales = torch.rand(2, 3, groups) + 1
    found = pad_groups(scales)
    assert found.shape == (2, 3, padded)
    assert torch.equal(found[..., :groups], scales) and not found[..., groups:].any()


@pytest.mark.parametrize(
    ("columns", "group", "panel"),
    [
        (5120, 16, 128),
        (2880, 32, 128),
        (2880, 128, 128),
        (1440, 32, 64),
        (320, 32, 64),
        (7168, 128, 128),
        (320, 128, 0),
        (176, 16, 0),
    ],
)
def test_panels_hold_whole_groups_and_leave_little_empty(columns: int, group: int, panel: int) -> None:
    assert panel_columns(columns, group) == panel


def test_a_panel_holds_a_run_of_columns_of_every_row() -> None:
    numbers = torch.arange(2 * 3 * 8).view(2, 3, 8)
    panels = to_panels(numbers, 4)
    assert panels.is_contiguous() and panels[1, 1].tolist() == [
        [28, 29, 30, 31],
        [36, 37, 38, 39],
        [44, 45, 46, 47],
    ]
    assert torch.equal(from_panels(panels), numbers)
    padded = to_panels(numbers, 6)
    assert padded.shape == (2, 2, 3, 6) and not padded[:, 1, :, 2:].any()
    assert torch.equal(from_panels(padded)[..., :8], numbers)
