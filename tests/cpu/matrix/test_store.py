"""The store, killed between any two statements."""

from __future__ import annotations

import sqlite3

import pytest

from firebox.errors import ConfigError
from firebox.matrix.base import Row, Verdict
from firebox.matrix.cells import cells
from firebox.matrix.processes import Process
from firebox.matrix.spec import parse
from firebox.matrix.store import Evidence, Result, Store

TEXT = 'command = "x {port} {a}"\n[axes]\na = [1, 2]'
CELLS = cells(parse(TEXT))
ROWS = tuple(Row(concurrency=n, requests=4, failed=0, verdict="ok", output_tok_s_wall=9.5) for n in (1, 2))
RESULT = Result(verdict=Verdict.STABLE, cause="", rows=ROWS, evidence=Evidence(last_lines=("a", "b")))


class Killed(BaseException):
    """kill -9, as far as a test in one process can have it."""


class Dying:
    """A connection that dies before its nth statement; what was not committed is lost with it."""

    def __init__(self, db: sqlite3.Connection, left: int) -> None:
        self.db, self.left = db, left

    def execute(self, *statement):
        if statement[0] == "ROLLBACK":
            raise Killed
        if self.left == 0:
            raise Killed
        self.left -= 1
        return self.db.execute(*statement)


def story(store: Store) -> None:
    """Two cells, one after the other, as the runner does it; goes on from whatever is there."""
    store.plan(TEXT, CELLS)
    for attempt in store.attempts():
        if attempt.state == "running":
            store.give_up(attempt.id)
    for cell in CELLS:
        if (cell.id, 0) not in store.finished():
            attempt = store.begin((cell.id, 0), f"marker of {cell.id}")
            store.started(attempt, Process(7, 8))
            store.finish(attempt, RESULT)


def check(store: Store) -> None:
    attempts = store.attempts()
    finished = [attempt for attempt in attempts if attempt.state == "finished"]
    assert sorted(a.cell for a in finished) == sorted(cell.id for cell in CELLS)
    assert all(attempt.result == RESULT for attempt in finished), "half a result"
    assert not any(attempt.state == "running" for attempt in attempts)
    assert all(attempt.result is None for attempt in attempts if attempt.state == "unfinished")
    assert [dict(cell.axes) for cell in store.cells()] == [dict(cell.axes) for cell in CELLS]


def test_killed_before_every_single_statement_nothing_is_lost_or_doubled(tmp_path):
    deaths = 0
    for left in range(200):
        folder = tmp_path / str(left)
        store = Store(folder)
        real = store._db
        store._db = Dying(real, left)
        try:
            story(store)
        except Killed:
            deaths += 1
            real.close()  # rolls an open transaction back, as recovery does after a kill
        else:
            real.close()
            break
        again = Store(folder)
        for attempt in again.attempts():
            assert (attempt.state == "finished") == (attempt.result is not None)
            assert attempt.result in (None, RESULT)
        story(again)
        check(again)
        again.close()
    assert deaths > 25, "the story has more statements than that"


def test_a_second_result_for_a_turn_is_refused(tmp_path):
    store = Store(tmp_path)
    story(store)
    again = store.begin((CELLS[0].id, 0), "m")
    with pytest.raises(sqlite3.IntegrityError):
        store.finish(again, RESULT)
    assert len(store.finished()) == 2
    assert store.attempts()[-1].state == "running", "the refused transaction left nothing behind"


def test_a_result_survives_word_for_word(tmp_path):
    store = Store(tmp_path)
    store.plan(TEXT, CELLS)
    attempt = store.begin((CELLS[0].id, 3), "m")
    store.started(attempt, Process(12, 34))
    evidence = Evidence(
        exit_code=-9, signature="s", matched="\x1b[31mé", findings=({"why": "x"},), notes=("n",)
    )
    result = Result(verdict=Verdict.NCCL, cause="c", remedy="r", rows=ROWS, evidence=evidence)
    store.finish(attempt, result)
    store.close()
    (found,) = Store(tmp_path, create=False).attempts()
    assert (found.result, found.root, found.round, found.marker) == (result, Process(12, 34), 3, "m")


def test_cells_of_an_earlier_specification_are_no_longer_planned(tmp_path):
    store = Store(tmp_path)
    story(store)
    fewer = TEXT.replace("[1, 2]", "[2]")
    store.plan(fewer, cells(parse(fewer)))
    assert [cell.axes["a"] for cell in store.cells()] == [2]
    assert len(store.finished()) == 2, "their results stay"


def test_one_runner_at_a_time(tmp_path):
    with Store(tmp_path).alone():
        other = Store(tmp_path)
        with pytest.raises(ConfigError, match="another process runs the grid"), other.alone():
            pass
    with Store(tmp_path).alone():
        pass


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no matrix\.sqlite"):
        Store(tmp_path, create=False)
    with pytest.raises(ConfigError, match="holds no plan"):
        Store(tmp_path).spec()
