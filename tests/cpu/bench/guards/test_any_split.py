"""What holds for any stream: the cut into pieces changes nothing, a loop at the end is always found, and so
is garbage in the last fifth."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firebox.bench.base import Finding
from tests.support.bench_streams import kind, records, watched

LOOP_TOKENS = 400


def _cut(text: str, seed: int) -> list[str]:
    chance = random.Random(seed)
    pieces, start = [], 0
    while start < len(text):
        length = chance.choice((1, 2, 3, 5, 9, 40, 700))
        pieces.append(text[start : start + length])
        start += length
    return pieces


def _verdict(found: list[Finding]) -> set[tuple[str, str, str]]:
    return {(finding.guard, finding.verdict, finding.why) for finding in found}


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 10**6), seed=st.integers(0, 2**32))
def test_the_cut_into_pieces_changes_nothing(index: int, seed: int) -> None:
    record = records()[index % len(records())]
    assert _verdict(watched(_cut(record.text, seed))) == _verdict(watched(record.pieces))


@settings(max_examples=80, deadline=None)
@given(
    index=st.integers(0, 10**6),
    start=st.integers(0, 10**6),
    unit=st.integers(1, 60),
    extra=st.integers(0, 59),
)
def test_400_tokens_of_a_loop_are_found_after_any_good_stream(
    index: int, start: int, unit: int, extra: int
) -> None:
    good = kind("good")
    long = [record for record in good if len(record.pieces) > 200]
    tokens = long[(index * 7) % len(long)].pieces
    loop = tokens[start % (len(tokens) - unit) :][:unit]
    whole = (loop * LOOP_TOKENS)[: LOOP_TOKENS + extra]
    assert watched([*good[index % len(good)].pieces, *whole]), loop


@pytest.mark.parametrize(
    "unit", ["!", " the", "the same again, ", "Wait. Let me think about it once more.\n"]
)
@pytest.mark.parametrize("characters", [1200, 2000, 4000])
def test_garbage_in_the_last_fifth_is_found(unit: str, characters: int) -> None:
    good = "".join(record.text for record in kind("good") if record.source.startswith("Python"))
    for start in range(0, 20_000, 3_571):
        text = good[start : start + characters * 4 // 5]
        assert watched(_cut(text, 1)) == []
        assert watched(_cut(text + (unit * characters)[: characters // 5], 1))
