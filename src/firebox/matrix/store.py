"""What has been run: an SQLite file that a kill -9 at any moment leaves usable.

    cells      what the specification asks for; `planned` is 0 for those of an earlier version of it
    attempts   one a start of a server: running → finished, or running → unfinished when the program was gone
    rows       what a finished attempt measured

Every change of state is one transaction. An attempt is written down, with the marker that finds its
processes, before anything is started; it is finished, with rows and evidence in the same transaction, after
the server has been stopped. So what is running here and nowhere else was interrupted: its processes are
ended, and its turn is run again. A finished turn is never run twice: the file itself refuses a second one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from firebox.errors import ConfigError
from firebox.matrix.base import Row, Verdict
from firebox.matrix.cells import Cell, Turn
from firebox.matrix.processes import Process

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cells (
    cell TEXT PRIMARY KEY, place INTEGER NOT NULL, planned INTEGER NOT NULL,
    axes TEXT NOT NULL, argv TEXT NOT NULL, env TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, cell TEXT NOT NULL REFERENCES cells, round INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'finished', 'unfinished')),
    marker TEXT NOT NULL, pid INTEGER, pid_started INTEGER, began REAL NOT NULL, ended REAL,
    verdict TEXT, cause TEXT, remedy TEXT, evidence TEXT,
    CHECK ((state = 'finished') = (verdict IS NOT NULL)));
CREATE UNIQUE INDEX IF NOT EXISTS finished_once ON attempts (cell, round) WHERE state = 'finished';
CREATE TABLE IF NOT EXISTS rows (
    attempt INTEGER NOT NULL REFERENCES attempts, number INTEGER NOT NULL, row TEXT NOT NULL,
    PRIMARY KEY (attempt, number));
"""
FILE, LOCK = "matrix.sqlite", "lock"


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Why a verdict is what it is. `exit_code`: None if the server ran until it was stopped; minus a signal's
    number. `ended`: how the measurement did. `signature`: the known failure's name, and `matched` its line;
    `source`: where that failure is described. `notes`: whatever else went wrong."""

    exit_code: int | None = None
    ended: str | None = None
    start_s: float | None = None
    signature: str | None = None
    matched: str | None = None
    source: str | None = None
    log: str = ""
    last_lines: tuple[str, ...] = ()
    findings: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What an attempt came to."""

    verdict: Verdict
    cause: str
    remedy: str = ""
    rows: tuple[Row, ...] = ()
    evidence: Evidence = Evidence()


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """A start of a server. `root`: its first process, once that is known. `result` once it is finished."""

    id: int
    cell: str
    round: int
    state: str
    marker: str
    root: Process | None
    began: float
    ended: float | None
    result: Result | None


class Store:
    """The file in a folder."""

    def __init__(self, folder: Path, *, create: bool = True) -> None:
        """Opens it. Raises ConfigError if it is not there and may not be made."""
        self.folder, file = folder, folder / FILE
        if not create and not file.is_file():
            raise ConfigError(f"{folder} holds no {FILE}", hint="the folder that `firebox matrix run` wrote")
        folder.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(file, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # a machine that hangs must not forget who did it
        if create:
            self._db.executescript(SCHEMA)

    def close(self) -> None:
        """Lets go of the file."""
        self._db.close()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Only one program runs a grid at a time. Raises ConfigError if another does; kill -9 lets go."""
        with (self.folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"another process runs the grid in {self.folder}", hint="--out DIR"
                ) from error
            yield

    def plan(self, spec: str, cells: Sequence[Cell]) -> None:
        """Writes down what is to be run; results of cells that are still asked for stay."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('spec', ?)", (spec,))
            self._db.execute("UPDATE cells SET planned = 0")
            for place, cell in enumerate(cells):
                entry = (cell.id, place, 1, *map(json.dumps, (dict(cell.axes), cell.argv, dict(cell.env))))
                self._db.execute("INSERT OR REPLACE INTO cells VALUES (?, ?, ?, ?, ?, ?)", entry)

    def spec(self) -> str:
        """The text of the specification that was planned last. Raises ConfigError if none was."""
        found = self._db.execute("SELECT value FROM meta WHERE key = 'spec'").fetchone()
        if found is None:
            raise ConfigError(f"{self.folder} holds no plan", hint="firebox matrix run SPEC.toml")
        return str(found[0])

    def cells(self) -> list[Cell]:
        """The planned cells, in the order of the axes."""
        query = "SELECT cell, axes, argv, env FROM cells WHERE planned ORDER BY place"
        return [
            Cell(id=cell, axes=json.loads(axes), argv=tuple(json.loads(argv)), env=json.loads(env))
            for cell, axes, argv, env in self._db.execute(query)
        ]

    def begin(self, turn: Turn, marker: str) -> int:
        """An attempt that is about to start a server. Returns its id."""
        entry = (*turn, "running", marker, time.time())
        columns = "(cell, round, state, marker, began)"
        with self._transaction():
            done = self._db.execute(f"INSERT INTO attempts {columns} VALUES (?, ?, ?, ?, ?)", entry)
        assert done.lastrowid is not None
        return done.lastrowid

    def started(self, attempt: int, root: Process) -> None:
        """Its first process."""
        with self._transaction():
            self._db.execute("UPDATE attempts SET pid = ?, pid_started = ? WHERE id = ?", (*root, attempt))

    def finish(self, attempt: int, result: Result) -> None:
        """Its server has been stopped, and this is what it came to."""
        judged = (result.verdict, result.cause, result.remedy, msgspec.json.encode(result.evidence).decode())
        with self._transaction():
            for number, row in enumerate(result.rows):
                entry = (attempt, number, msgspec.json.encode(row).decode())
                self._db.execute("INSERT INTO rows VALUES (?, ?, ?)", entry)
            self._db.execute(
                "UPDATE attempts SET state = 'finished', ended = ?, verdict = ?, cause = ?, remedy = ?, "
                "evidence = ? WHERE id = ? AND state = 'running'",
                (time.time(), *judged, attempt),
            )

    def give_up(self, attempt: int) -> None:
        """It was interrupted, and its processes are gone."""
        with self._transaction():
            self._db.execute("UPDATE attempts SET state = 'unfinished' WHERE id = ?", (attempt,))

    def attempts(self) -> list[Attempt]:
        """All of them, in the order in which they began."""
        query = (
            "SELECT id, cell, round, state, marker, pid, pid_started, began, ended, verdict, cause, remedy, "
            "evidence FROM attempts ORDER BY id"
        )
        return [self._attempt(found) for found in self._db.execute(query)]

    def finished(self) -> set[Turn]:
        """The turns that need not be run again."""
        query = "SELECT cell, round FROM attempts WHERE state = 'finished'"
        return {(cell, number) for cell, number in self._db.execute(query)}

    def _attempt(self, found: Sequence[Any]) -> Attempt:
        id, cell, number, state, marker, pid, pid_started, began, ended, *judged = found
        root = None if pid is None else Process(pid, pid_started)
        result = self._result(id, judged) if state == "finished" else None
        return Attempt(
            id=id,
            cell=cell,
            round=number,
            state=state,
            marker=marker,
            root=root,
            began=began,
            ended=ended,
            result=result,
        )

    def _result(self, attempt: int, judged: Sequence[Any]) -> Result:
        verdict, cause, remedy, evidence = judged
        query = "SELECT row FROM rows WHERE attempt = ? ORDER BY number"
        rows = tuple(msgspec.json.decode(row, type=Row) for (row,) in self._db.execute(query, (attempt,)))
        return Result(
            verdict=Verdict(verdict),
            cause=cause,
            remedy=remedy,
            rows=rows,
            evidence=msgspec.json.decode(evidence, type=Evidence),
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
