"""What became of an attempt, from how the server ended, its log, the guards and the rows.

The first that applies:

1. A known line of the log (signatures.toml), where something went wrong: the server ended, did not get
   healthy, fell silent, or failed requests. A cause that is named beats the symptom, also if the process
   lives on. Once the server was healthy only what it wrote from then on counts, unless it ended.
2. How the process ended: its signal or exit status.
3. It was never healthy: STARTUP_TIMEOUT. It was, and no token came: HANG.
4. What the guards found: GARBAGE, then REPETITION, then an empty or suspicious answer.
5. Failed requests, rows that are missing or without a passed guard: UNKNOWN.
6. STABLE: every row is there, no request failed, no guard spoke.

A server that answers well is STABLE whatever its log says.
"""

from __future__ import annotations

import functools
import re
import signal
import tomllib
from importlib import resources
from pathlib import Path
from typing import TypeVar

import msgspec

from firebox.matrix.base import Load, Measured, Verdict

LAST_LINES = 200
SEARCHED_BYTES = 4 * 2**20  # of the end of a log
LINE_CHARACTERS = 2000  # of a line that is searched or kept
T = TypeVar("T", "Signature", "Signal")
PASSED = "ok"  # a row's verdict, as the benchmark writes it


class Signature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A known failure. `pattern`: a regular expression, searched in single lines."""

    name: str
    pattern: str
    verdict: Verdict
    cause: str
    remedy: str
    source: str


class Signal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it means that a signal ended a server. `source`: where that is described."""

    signal: str
    verdict: Verdict
    cause: str
    remedy: str
    source: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt went. `exit_code`: of a server that ended by itself. `healthy_at` and `stopped_at`: how
    long its log was, in bytes, when it became healthy (None: it never did), and before it was stopped: what
    it says while it is being ended explains nothing. `failure`: of the measurement itself."""

    exit_code: int | None
    healthy_at: int | None
    stopped_at: int
    measured: Measured | None
    log: Path
    start_s: float
    failure: str | None = None


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict, and why."""

    verdict: Verdict
    cause: str
    remedy: str = ""
    signature: str | None = None
    matched: str | None = None
    source: str | None = None


def judge(outcome: Outcome, load: Load) -> Judgement:
    """What became of it. Reads the log."""
    if _went_wrong(outcome):
        found = _by_log(outcome) or _by_exit(outcome)
        if found is not None:
            return found
    return _by_symptom(outcome) or _by_guards(outcome) or _by_rows(outcome, load)


def match(line: str) -> tuple[Signature, str] | None:
    """The first signature that this line shows, and the part of the line that is kept."""
    line = line[:LINE_CHARACTERS]
    for signature, pattern in signatures():
        if pattern.search(line):
            return signature, line.strip()
    return None


@functools.cache
def signatures() -> tuple[tuple[Signature, re.Pattern[str]], ...]:
    """All known failures, the more specific before the general."""
    return tuple((found, re.compile(found.pattern)) for found in _data("signature", Signature))


def last_lines(log: Path) -> tuple[str, ...]:
    """The end of a log."""
    lines = _text(log, 0, log_size(log)).splitlines()[-LAST_LINES:]
    return tuple(line[:LINE_CHARACTERS] for line in lines)


def _went_wrong(outcome: Outcome) -> bool:
    measured = outcome.measured
    if outcome.exit_code is not None or measured is None or measured.ended != "complete":
        return True
    return any(row.failed for row in measured.rows)


def _by_log(outcome: Outcome) -> Judgement | None:
    """The most specific signature in the log; of several lines, the first: what follows is often its echo."""
    found = _search(outcome, outcome.healthy_at or 0)
    if found is None and outcome.healthy_at and outcome.exit_code is not None:
        found = _search(outcome, 0)  # what a thread wrote late, or the other way about
    if found is None:
        return None
    signature, line = found
    return Judgement(
        verdict=signature.verdict,
        cause=signature.cause,
        remedy=signature.remedy,
        signature=signature.name,
        matched=line,
        source=signature.source,
    )


def _search(outcome: Outcome, start: int) -> tuple[Signature, str] | None:
    text = _text(outcome.log, start, outcome.stopped_at)
    lines = [line[:LINE_CHARACTERS] for line in text.splitlines()]
    for signature, pattern in signatures():
        for line in lines:
            if pattern.search(line):
                return signature, line.strip()
    return None


def _by_exit(outcome: Outcome) -> Judgement | None:
    code = outcome.exit_code
    if code is None:
        return None
    number = -code if code < 0 else code - 128 if code > 128 else 0  # a shell's 128 + n
    for known in _data("signal", Signal):
        if number == getattr(signal, known.signal):
            return Judgement(
                verdict=known.verdict, cause=known.cause, remedy=known.remedy, source=known.source
            )
    ended = f"signal {number}" if number else f"status {code}"
    when = "before it was healthy" if outcome.healthy_at is None else "while it was measured"
    return Judgement(
        verdict=Verdict.UNKNOWN, cause=f"the server ended with {ended} {when}", remedy="read its log"
    )


def _by_symptom(outcome: Outcome) -> Judgement | None:
    measured = outcome.measured
    if outcome.healthy_at is None:
        cause = f"not healthy after {outcome.start_s:.0f} s"
        return Judgement(
            verdict=Verdict.STARTUP_TIMEOUT, cause=cause, remedy="a longer limits.start_s, or its log"
        )
    if measured is not None and measured.ended == "silent":
        cause = "healthy, but no token came for limits.silence_s"
        return Judgement(
            verdict=Verdict.HANG, cause=cause, remedy="py-spy dump of its processes while it hangs"
        )
    if outcome.failure is not None:
        return Judgement(verdict=Verdict.UNKNOWN, cause=f"the measurement failed: {outcome.failure}")
    return None


def _by_guards(outcome: Outcome) -> Judgement | None:
    assert outcome.measured is not None, "a failure without measurement has been judged"
    for said, verdict in (
        ("garbage", Verdict.GARBAGE),
        ("repetition", Verdict.REPETITION),
        ("empty", Verdict.GARBAGE),
        ("suspicious", Verdict.UNKNOWN),
    ):
        for finding in outcome.measured.findings:
            if finding.verdict == said:
                return Judgement(verdict=verdict, cause=f"{finding.guard}: {finding.why}")
    return None


def _by_rows(outcome: Outcome, load: Load) -> Judgement:
    assert outcome.measured is not None, "a failure without measurement has been judged"
    rows = outcome.measured.rows
    for row in rows:
        if row.failed:
            error = f": {row.error}" if row.error else ""
            cause = f"{row.failed} of {row.requests} requests failed at concurrency {row.concurrency}{error}"
            return Judgement(verdict=Verdict.UNKNOWN, cause=cause)
    missing = set(load.concurrency) - {row.concurrency for row in rows}
    if missing:
        why = (
            "limits.cell_s is too short" if outcome.measured.ended == "deadline" else "they were not measured"
        )
        cause = f"no row for concurrency {', '.join(map(str, sorted(missing)))}: {why}"
        return Judgement(verdict=Verdict.UNKNOWN, cause=cause)
    for row in rows:
        if row.verdict != PASSED:
            why = f": {row.why[0]}" if row.why else ""
            cause = f"the row of concurrency {row.concurrency} is {row.verdict}{why}"
            return Judgement(verdict=Verdict.UNKNOWN, cause=cause)
    return Judgement(verdict=Verdict.STABLE, cause="")


def log_size(log: Path) -> int:
    """Bytes of a log so far."""
    return log.stat().st_size if log.exists() else 0


def _text(log: Path, start: int, end: int) -> str:
    """A log from one byte to another; of a long stretch, the end."""
    start = max(start, end - SEARCHED_BYTES)
    with log.open("rb") as file:
        file.seek(start)
        return file.read(max(0, end - start)).decode("utf-8", "replace")


@functools.cache
def _data(kind: str, of: type[T]) -> tuple[T, ...]:
    text = resources.files("firebox.matrix").joinpath("signatures.toml").read_text(encoding="utf-8")
    return tuple(msgspec.convert(entry, of) for entry in tomllib.loads(text)[kind])
