"""What a GPU's runner draws, and when it waits for it, without a GPU: its sampling kernels under Triton's
interpreter (tests/support/interpreted_drawing.py). On a GPU: tests/gpu/test_sample.py, test_engine.py."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.interpreter import interpreted

DECODE, WAITED_FOR, PREFILL = "graph/decode", "graph/decode, waited for", "eager/prefill"


@pytest.fixture(scope="module")
def drawn() -> dict[str, Any]:
    found: dict[str, Any] = interpreted("interpreted_drawing")
    return found


def test_every_kind_of_request_gets_what_the_cpu_gives_it(drawn: dict[str, Any]) -> None:
    for row in drawn["rows"]:
        for kind, wanted in row["wanted"].items():
            found = row["found"][kind]
            assert found["ids"] == wanted["ids"] and found["error"] is None, kind
            close(found["logprobs"], wanted["logprobs"])
            close(found["prompt"] or [], wanted["prompt"] or [])
    last = drawn["rows"][-1]["found"]
    assert [len(last[kind]["logprobs"]) for kind in ("greedy", "logprobs", "chosen alone")] == [0, 3, 3]
    assert last["bias and prompt"]["ids"] == [7] * 3 and len(last["bias and prompt"]["prompt"]) == 3
    assert len({tuple(found["ids"]) for found in last.values()}) >= 5, "kinds that all draw alike show little"


def close(found: list[Any], wanted: list[Any]) -> None:
    assert len(found) == len(wanted)
    for mine, its in zip(found, wanted, strict=True):
        if its is None:
            assert mine is None
            continue
        assert (mine[0], mine[2], mine[3]) == (its[0], its[2], its[3])
        assert [mine[1], *mine[4]] == pytest.approx([its[1], *its[4]], abs=1e-5)


def test_filters_wait_for_nobody(drawn: dict[str, Any]) -> None:
    """With a temperature, with filters, and with what needs known tokens or logprobs: three tokens, of which
    the prompt's step draws one."""
    plain, filtered, mixed = drawn["rows"]
    for row in (plain, filtered):
        assert row["steps"] == {PREFILL: 1, DECODE: 2} and row["ahead"] == 1
    assert mixed["ahead"] == 0
    assert {mode: n for mode, n in mixed["steps"].items() if n} == {PREFILL: 1, WAITED_FOR: 2}


def test_captures_are_told_once(drawn: dict[str, Any]) -> None:
    assert drawn["captured"] == [[2, None], [3, None], [8, None]] and drawn["none left"]


def test_under_strict_requests_without_a_graph_run_in_halves() -> None:
    """A step of three has none: one and two go on from graphs of their own, none launch by launch."""
    found = interpreted("interpreted_drawing", "refused")
    (three,) = found["rows"]
    assert [kind for kind, said in three["found"].items() if said["error"] is not None] == []
    assert {kind: said["ids"] for kind, said in three["found"].items()} == {
        kind: said["ids"] for kind, said in three["wanted"].items()
    }
    assert not any(mode.startswith("eager/") and mode != PREFILL for mode in three["steps"])
    failed = [error for rows, error in found["captured"] if rows == 3]
    assert failed and all(error == "RuntimeError: out of memory, as planned" for error in failed)
