"""One Watch for all streams of a phase: nothing slips through because streams are short, end together, never
end, fail, or loop in their reasoning."""

from __future__ import annotations

import time

import pytest

from firebox.bench.base import Piece
from firebox.bench.watch import Watch
from tests.support.bench_streams import answer, kind


def test_streams_that_all_end_before_the_first_check_are_judged() -> None:
    watch = Watch()
    for _ in range(20):
        assert all(watch.see(number, Piece(0.0, "!")) is None for number in range(64))
    ended = [watch.end(number, answer(number)) for number in range(64)]
    assert all(found and found.guard == "one_token" for found in ended)
    assert [found.answers for found in watch.findings()] == [(number,) for number in range(64)]


def test_a_loop_is_told_while_the_stream_runs_and_once() -> None:
    watch = Watch()
    told = [watch.see(3, Piece(0.0, "and so on, ")) for _ in range(300)]
    found = [finding for finding in told if finding]
    assert found[0].guard == "one_token" and found[0].answers == (3,)
    assert told.index(found[0]) * 11 < 800
    watch.end(3, answer(3))
    guards = [finding.guard for finding in watch.findings()]
    assert len(guards) == len(set(guards))


def test_streams_do_not_mix() -> None:
    watch = Watch()
    for _ in range(400):
        for number, text in enumerate(("one ", "two ")):
            watch.see(number, Piece(0.0, text))
    watch.see(2, Piece(0.0, "Fine."))
    assert {finding.answers for finding in watch.findings()} == {(0,), (1,)}


def test_reasoning_is_watched_apart_from_content() -> None:
    watch = Watch()
    good = kind("good")[0].pieces
    for index in range(600):
        watch.see(0, Piece(0.0, "Wait, once more: is it so? ", reasoning=True))
        watch.see(0, Piece(0.0, good[index % len(good)] if index < len(good) else ""))
    watch.end(0, answer())
    assert watch.findings()
    assert all(finding.why.startswith("reasoning: ") for finding in watch.findings())


def test_a_stream_that_never_ends_is_judged_where_it_stands() -> None:
    watch = Watch()
    for _ in range(40):
        watch.see(0, Piece(0.0, " the"))
    watch.see(1, Piece(0.0, " "))
    assert {finding.answers for finding in watch.findings()} == {(0,)}
    assert watch.findings() == watch.findings()


@pytest.mark.parametrize(("reasoning", "content", "empty"), [
    ("", "", True), ("", " \n", True), ("", "<|im_end|>", True), ("\n\n", "42", False),
    ("Let me think.", "", False), ("Let me think.", "\n\n", False),
])  # fmt: skip
def test_empty_is_said_of_the_whole_answer(reasoning: str, content: str, empty: bool) -> None:
    watch = Watch()
    watch.see(0, Piece(0.0, reasoning, reasoning=True))
    watch.see(0, Piece(0.0, content))
    found = watch.end(0, answer())
    assert (found is not None and found.guard == "empty") == empty


def test_a_failed_request_is_not_called_empty() -> None:
    watch = Watch()
    assert watch.end(0, answer(error="connection reset")) is None
    for _ in range(60):
        watch.see(1, Piece(0.0, "!!"))
    found = watch.end(1, answer(1, error="connection reset"))
    assert found is not None and found.guard == "one_token"


@pytest.mark.alone
def test_all_guards_cost_at_most_ten_microseconds_a_piece() -> None:
    streams = [record.pieces for record in kind("good") if len(record.pieces) > 200]
    least = min(_cost_us(streams) for _ in range(3))
    assert least < 10.0, f"{least:.1f} us a piece"


def _cost_us(streams: list[list[str]]) -> float:
    watch, begun = Watch(), time.process_time()
    for number, pieces in enumerate(streams):
        for text in pieces:
            watch.see(number, Piece(0.0, text))
        watch.end(number, answer(number))
    return (time.process_time() - begun) / sum(map(len, streams)) * 1e6
