"""What a tuning run has found out so far, in one SQLite file: a run that is killed goes on where it stopped,
and takes the same decisions, since it reads the same numbers.

A row is a fact about one candidate of one task on one GPU, under the compiler and the kernel's code that it
was found with; other code, other facts.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from firebox.tuning.base import Candidate, Task

SCHEMA = "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, fact TEXT NOT NULL) WITHOUT ROWID"


class Journal:
    """`path` None: kept in memory. `gpu`: its name. A write is on disk, or not there at all, when it
    returns."""

    def __init__(self, path: Path | None, gpu: str, triton: str) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = sqlite3.connect(":memory:" if path is None else path, isolation_level=None)
        self._rows.execute("PRAGMA journal_mode=WAL")
        self._rows.execute(SCHEMA)
        self._of = (gpu, triton)

    def read(self, task: Task, candidate: Candidate | None, what: str) -> Any:
        """The fact, or None. `what`: "samples", "final", … ; candidate None: about the task."""
        found = self._rows.execute(
            "SELECT fact FROM facts WHERE name = ?", (self._name(task, candidate, what),)
        ).fetchone()
        return None if found is None else json.loads(found[0])

    def write(self, task: Task, candidate: Candidate | None, what: str, fact: Any) -> None:
        """Replaces what was known."""
        row = (self._name(task, candidate, what), json.dumps(fact))
        self._rows.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", row)

    def close(self) -> None:
        """No more reads or writes."""
        self._rows.close()

    def _name(self, task: Task, candidate: Candidate | None, what: str) -> str:
        code = "" if candidate is None or candidate.request is None else candidate.request.kernel.cache_key
        name = "" if candidate is None else candidate.name
        return json.dumps([*self._of, str(task), name, code, what])
