"""Runs a grid: each turn starts a server, waits for its health, measures, stops it, judges, writes it down.

    begin ─ start ─ healthy? ─ measure ─ stop ─ judge ─ finish
      └ written      └ STARTUP_TIMEOUT     └ every process gone, port free
        down first

Whatever a cell does stays in its cell. What interrupts this program leaves the turn unfinished in the store;
the next run ends the servers that were left behind, and goes on with the turns that are not finished.
"""

from __future__ import annotations

import concurrent.futures
import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from firebox.bench.timer import now
from firebox.matrix.base import Load, Measure, Measured, Verdict
from firebox.matrix.cells import Cell, Turn, cells, order
from firebox.matrix.classify import Outcome, judge, last_lines, log_size
from firebox.matrix.feasible import infeasible
from firebox.matrix.server import Server, free_port, sweep
from firebox.matrix.spec import Limits, Spec
from firebox.matrix.store import Evidence, Result, Store

LATE_S = 30.0  # for a measurement to return after its deadline
SETTLE_S = 5.0  # for a server whose requests failed to end by itself, so that its exit code is known
log = logging.getLogger(__name__)
OnTurn = Callable[[int, int, Turn, Verdict, str], None]
"""Called after each turn: its number, how many there are, the turn, the verdict and its cause."""


def run(spec: Spec, text: str, store: Store, measure: Measure, on_turn: OnTurn | None = None) -> bool:
    """Runs what is not finished yet; `text`: the specification's own. True: every planned turn has a verdict.

    Raises ConfigError for a grid that another process runs.
    """
    planned = cells(spec)
    turns = order(spec, planned)
    with store.alone():
        store.plan(text, planned)
        _clean_up(store, spec.limits)
        known = {cell.id: cell for cell in planned}
        runner = _Runner(spec, store, measure)
        for number, turn in enumerate(turns, start=1):
            if turn not in store.finished():
                result = runner.turn(known[turn[0]], turn)
                if on_turn is not None:
                    on_turn(number, len(turns), turn, result.verdict, result.cause)
        return store.finished() >= set(turns)


def _clean_up(store: Store, limits: Limits) -> None:
    """Ends the servers of attempts that were interrupted."""
    for attempt in store.attempts():
        if attempt.state == "running":
            left = sweep(attempt.marker, attempt.root, limits.stop_s)
            log.info("%s was interrupted; %d processes of it were left", attempt.cell, left)
            store.give_up(attempt.id)


class _Runner:
    def __init__(self, spec: Spec, store: Store, measure: Measure) -> None:
        self.spec, self.store, self.measure = spec, store, measure

    def turn(self, cell: Cell, turn: Turn) -> Result:
        """One attempt, from the first word in the store to the last."""
        earlier = self.store.attempts()
        interrupted = sum((a.cell, a.round) == turn and a.state == "unfinished" for a in earlier)
        why = infeasible(self.spec.fit, cell)
        marker = secrets.token_hex(16)
        attempt = self.store.begin(turn, marker)
        limit = self.spec.limits.attempts
        if limit is not None and interrupted >= limit:
            cause = f"this program or the machine ended during {interrupted} attempts"
            result = Result(verdict=Verdict.UNKNOWN, cause=cause, remedy="a higher limits.attempts")
        elif why is not None:
            result = Result(verdict=Verdict.INFEASIBLE, cause=why)
        else:
            result = self._attempt(cell, attempt, marker)
        self.store.finish(attempt, result)
        return result

    def _attempt(self, cell: Cell, attempt: int, marker: str) -> Result:
        file = self.store.folder / "logs" / f"{attempt:05d}.log"
        file.parent.mkdir(exist_ok=True)
        try:
            server = Server(cell.argv, cell.env, port=free_port(), log=file, marker=marker)
        except OSError as error:
            cause = f"{cell.argv[0]} cannot be started: {error.strerror}"
            return Result(verdict=Verdict.UNKNOWN, cause=cause, remedy="the command in the specification")
        try:
            if server.root is not None:
                self.store.started(attempt, server.root)
            outcome, took_s = self._observe(server)
        finally:
            problems = server.stop(self.spec.limits.stop_s)
        return self._result(outcome, took_s, problems)

    def _observe(self, server: Server) -> tuple[Outcome, float]:
        """Health and measurement; the server may still run afterwards."""
        began = now()
        limits = self.spec.limits
        healthy_at, measured, failure = None, None, None
        if server.wait_until_healthy(self.spec.health, limits.start_s):
            took_s, healthy_at = now() - began, log_size(server.log)
            measured, failure = guarded(self.measure, server, self.spec.load, limits)
        else:
            took_s = now() - began
        wrong = measured is None or measured.ended != "complete" or any(row.failed for row in measured.rows)
        if healthy_at is not None and wrong:
            server.wait_for_exit(SETTLE_S if measured is None or measured.ended != "silent" else 0.0)
        outcome = Outcome(
            exit_code=server.exit_code,
            healthy_at=healthy_at,
            stopped_at=log_size(server.log),
            measured=measured,
            log=server.log,
            start_s=limits.start_s,
            failure=failure,
        )
        return outcome, took_s

    def _result(self, outcome: Outcome, took_s: float, problems: list[str]) -> Result:
        judgement = judge(outcome, self.spec.load)
        measured = outcome.measured or Measured()
        evidence = Evidence(
            exit_code=outcome.exit_code,
            ended=None if outcome.measured is None else outcome.measured.ended,
            start_s=took_s if outcome.healthy_at is not None else None,
            signature=judgement.signature,
            matched=judgement.matched,
            source=judgement.source,
            log=str(Path("logs") / outcome.log.name),
            last_lines=last_lines(outcome.log),
            findings=tuple(_plain(finding) for finding in measured.findings),
            notes=tuple(problems),
        )
        return Result(
            verdict=judgement.verdict,
            cause=judgement.cause,
            remedy=judgement.remedy,
            rows=measured.rows,
            evidence=evidence,
        )


def guarded(
    measure: Measure, server: Server, load: Load, limits: Limits
) -> tuple[Measured | None, str | None]:
    """The measurement, or what it failed with. A measurement that does not return counts as silence: the
    thread is left alone, and ends when the server's connections do."""
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="measure")
    future = pool.submit(
        measure,
        server.url,
        load,
        deadline_s=limits.cell_s,
        silence_s=limits.silence_s,
        alive=server.alive,
    )
    pool.shutdown(wait=False)
    concurrent.futures.wait([future], timeout=limits.cell_s + LATE_S)
    if not future.done():
        return Measured(ended="silent"), None
    error = future.exception()
    if error is None:
        return future.result(), None
    log.error("the measurement failed", exc_info=error)
    return None, f"{type(error).__name__}: {error}"


def _plain(record: msgspec.Struct) -> Mapping[str, object]:
    found: Mapping[str, object] = msgspec.to_builtins(record)
    return found
