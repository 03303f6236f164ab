"""Every report that was made, in one SQLite file: what `bench compare` reads."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firebox.errors import ConfigError

SCHEMA = """
CREATE TABLE IF NOT EXISTS reports (
    id INTEGER PRIMARY KEY,
    name TEXT,
    began TEXT NOT NULL,
    url TEXT NOT NULL,
    model TEXT NOT NULL,
    profile TEXT NOT NULL,
    document TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS reports_name ON reports (name);
"""


def save(file: Path, document: dict[str, Any], name: str | None) -> int:
    """Adds a report, and returns its number. `name`: how `bench compare` may call it; the latest of a name
    counts."""
    with _open(file, create=True) as database:
        values = (name, *(document[key] for key in ("began", "url", "model", "profile")))
        cursor = database.execute(
            "INSERT INTO reports (name, began, url, model, profile, document) VALUES (?, ?, ?, ?, ?, ?)",
            (*values, json.dumps(document)),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid


def find(file: Path, which: str) -> dict[str, Any]:
    """A report by its number, its name, or as a file that `bench --json` wrote. Raises ConfigError."""
    if Path(which).is_file():
        return _from_file(Path(which))
    if not file.expanduser().is_file():
        raise ConfigError(f"there is no report {which!r}: no file of that name, and no store at {file}")
    with _open(file, create=False) as database:
        column = "id" if which.isdigit() else "name"
        found = database.execute(
            f"SELECT document FROM reports WHERE {column} = ? ORDER BY id DESC LIMIT 1", (which,)
        ).fetchone()
    if found is None:
        raise ConfigError(
            f"{file} holds no report {which!r}", hint="give its number, its name or a JSON file"
        )
    document: dict[str, Any] = json.loads(found[0])
    return document


def _from_file(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8").strip().splitlines()[-1])
        if isinstance(document, dict) and isinstance(document.get("rows"), list):
            return document
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{file} is not what `firebox bench --json` prints: {error}") from error
    raise ConfigError(f"{file} is not what `firebox bench --json` prints: it has no rows")


@contextlib.contextmanager
def _open(file: Path, *, create: bool) -> Iterator[sqlite3.Connection]:
    file = file.expanduser()
    if create:
        file.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(file)
    try:
        with database:
            database.executescript(SCHEMA)
            yield database
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{file} is not a store of reports: {error}") from error
    finally:
        database.close()
