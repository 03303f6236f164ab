"""Which of several signs decides."""

from __future__ import annotations

import pytest

from firebox.bench.base import Finding
from firebox.matrix.base import Load, Measured, Row, Verdict
from firebox.matrix.classify import LAST_LINES, Outcome, judge, last_lines

LOAD = Load(concurrency=(1, 4))
SHARED = "out of resource: shared memory, Required: 147456, Hardware limit: 101376."
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB."


def row(concurrency: int, **changed: object) -> Row:
    return Row(concurrency=concurrency, **{"requests": 8, "failed": 0, "verdict": "ok", **changed})


GOOD = Measured(rows=(row(1), row(4)))


def outcome(tmp_path, before: str = "", after: str = "", at_stop: str = "", **changed: object) -> Outcome:
    log = tmp_path / "log"
    log.write_text(before + after + at_stop)
    fields = {
        "exit_code": None,
        "healthy_at": len(before),
        "stopped_at": len(before + after),
        "measured": GOOD,
        "log": log,
        "start_s": 9.0,
        **changed,
    }
    return Outcome(**fields)


def verdict(*arguments: object, **changed: object) -> Verdict:
    return judge(outcome(*arguments, **changed), LOAD).verdict


def finding(said: str) -> Measured:
    return Measured(rows=(row(1), row(4)), findings=(Finding(guard="g", verdict=said, why="w"),))


def test_all_well(tmp_path):
    assert verdict(tmp_path) is Verdict.STABLE
    assert verdict(tmp_path, f"{SHARED}\n", f"{OOM}\n") is Verdict.STABLE, "it answered well all the same"


def test_a_crash_with_a_known_line_beats_its_exit_code(tmp_path):
    died = Measured(rows=(row(1, failed=8, verdict="failed"),), ended="dead")
    found = judge(outcome(tmp_path, "", f"{SHARED}\n", exit_code=-9, measured=died), LOAD)
    assert (found.verdict, found.signature) == (Verdict.OUT_OF_SHARED_MEMORY, "triton-shared-memory-99k")
    assert found.matched == SHARED
    assert found.source and found.remedy


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (-4, Verdict.ILLEGAL_INSTRUCTION),
        (132, Verdict.ILLEGAL_INSTRUCTION),
        (-9, Verdict.OUT_OF_MEMORY),
        (137, Verdict.OUT_OF_MEMORY),
        (-11, Verdict.UNKNOWN),
        (139, Verdict.UNKNOWN),
        (1, Verdict.UNKNOWN),
        (0, Verdict.UNKNOWN),
    ],
)
def test_without_a_known_line_the_exit_code_decides(tmp_path, code, expected):
    assert verdict(tmp_path, exit_code=code, healthy_at=None, measured=None) is expected


def test_an_unknown_end_says_what_is_known(tmp_path):
    found = judge(outcome(tmp_path, exit_code=77, measured=Measured(ended="dead")), LOAD)
    assert found.cause == "the server ended with status 77 while it was measured"
    found = judge(outcome(tmp_path, exit_code=-11, healthy_at=None, measured=None), LOAD)
    assert "SIGSEGV" in found.cause


def test_a_named_cause_beats_waiting(tmp_path):
    waits = {"healthy_at": None, "measured": None}
    assert verdict(tmp_path, **waits) is Verdict.STARTUP_TIMEOUT
    assert verdict(tmp_path, "", f"{OOM}\n", **waits) is Verdict.OUT_OF_MEMORY
    silent = Measured(ended="silent")
    assert verdict(tmp_path, measured=silent) is Verdict.HANG
    assert verdict(tmp_path, "", f"{SHARED}\n", measured=silent) is Verdict.OUT_OF_SHARED_MEMORY


def test_what_was_said_before_health_counts_only_if_the_server_ended(tmp_path):
    silent = Measured(ended="silent")
    assert verdict(tmp_path, f"{OOM}\n", "ready\n", measured=silent) is Verdict.HANG
    died = {"exit_code": 1, "measured": Measured(ended="dead")}
    assert verdict(tmp_path, f"{OOM}\n", "ready\n", **died) is Verdict.OUT_OF_MEMORY
    assert verdict(tmp_path, f"{OOM}\n", f"{SHARED}\n", **died) is Verdict.OUT_OF_SHARED_MEMORY


def test_what_is_said_while_the_server_is_stopped_does_not_count(tmp_path):
    silent = Measured(ended="silent")
    assert verdict(tmp_path, "", "", f"{OOM}\n", measured=silent) is Verdict.HANG


def test_guards_beat_stable_and_crashes_beat_guards(tmp_path):
    assert verdict(tmp_path, measured=finding("garbage")) is Verdict.GARBAGE
    assert verdict(tmp_path, measured=finding("empty")) is Verdict.GARBAGE
    assert verdict(tmp_path, measured=finding("repetition")) is Verdict.REPETITION
    assert verdict(tmp_path, measured=finding("suspicious")) is Verdict.UNKNOWN
    both = Measured(rows=GOOD.rows, findings=finding("repetition").findings + finding("garbage").findings)
    assert verdict(tmp_path, measured=both) is Verdict.GARBAGE
    assert verdict(tmp_path, "", f"{OOM}\n", exit_code=1, measured=both) is Verdict.OUT_OF_MEMORY


def test_failed_requests_and_missing_rows_are_never_stable(tmp_path):
    failed = Measured(rows=(row(1), row(4, failed=2, verdict="failed", error="503")))
    found = judge(outcome(tmp_path, measured=failed), LOAD)
    assert found.verdict is Verdict.UNKNOWN
    assert found.cause == "2 of 8 requests failed at concurrency 4: 503"
    assert verdict(tmp_path, "", f"{SHARED}\n", measured=failed) is Verdict.OUT_OF_SHARED_MEMORY
    found = judge(outcome(tmp_path, measured=Measured(rows=(row(1),), ended="deadline")), LOAD)
    assert (found.verdict, found.cause) == (
        Verdict.UNKNOWN,
        "no row for concurrency 4: limits.cell_s is too short",
    )
    unguarded = Measured(rows=(row(1), row(4, verdict="unguarded")))
    assert judge(outcome(tmp_path, measured=unguarded), LOAD).cause == "the row of concurrency 4 is unguarded"


def test_the_specific_line_wins_wherever_it_stands(tmp_path):
    text = f"torch.distributed.DistBackendError: NCCL error\n{SHARED}\n"
    assert verdict(tmp_path, "", text, exit_code=1, healthy_at=None) is Verdict.OUT_OF_SHARED_MEMORY


def test_logs_of_any_size_and_kind(tmp_path):
    noise = "x" * 5000 + "\n"
    found = judge(outcome(tmp_path, "", noise * 1200 + f"{OOM}\n", exit_code=1, measured=None), LOAD)
    assert found.verdict is Verdict.OUT_OF_MEMORY
    (tmp_path / "log").write_bytes(b"\xff\xfe\n" * 500 + b"end")
    kept = last_lines(tmp_path / "log")
    assert (len(kept), kept[-1]) == (LAST_LINES, "end")
