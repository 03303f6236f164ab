"""What a benchmark found, whole."""

from __future__ import annotations

import msgspec

from firebox.bench.drive import Run
from firebox.bench.row import Row


class Report(msgspec.Struct, kw_only=True):
    """Everything a benchmark found. `notes`: what a reader of the numbers must know. `runs`: the answers
    behind the rows, row by row and repetition by repetition. `unfinished`: some runs were left out."""

    url: str
    model: str
    profile: str
    firebox: str
    began: str
    seed: int
    notes: list[str]
    rows: list[Row]
    runs: list[list[Run]]
    unfinished: bool = False

    @property
    def passed(self) -> bool:
        """Whether every row has a number."""
        return all(row.verdict == "ok" for row in self.rows)
