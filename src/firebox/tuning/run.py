"""Tunes a model: each distinct problem of its layers in turn, within one budget, and writes the files as it
goes.

What is found is on disk after every problem, and in the journal after every measurement: whoever stops it, or
kills it, keeps what there is and goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from firebox.bench.timer import now
from firebox.hardware.base import Gpu
from firebox.kernels import _triton
from firebox.tuning.base import Task
from firebox.tuning.journal import Journal
from firebox.tuning.search import KEYS, Entry, Meter, Report, Search, interleave_keys
from firebox.tuning.write import folder_of, merge

# Batches, and chunks of prompts, that servers really run.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
COMPILING_SHARE = 0.7  # of the budget, where something is to be measured afterwards


@dataclass(frozen=True)
class Work:
    """One problem of a model. `tunable`: a file of tuning/; `layers`: how many layers have it."""

    tunable: Any
    problem: Any
    layers: int


@dataclass(frozen=True)
class Tuned:
    """What became of one problem."""

    work: Work
    entries: tuple[Entry, ...]
    report: Report
    file: Path


Progress = Callable[[Work, str, int, int], None]


def sizes_of(drafts: int, chunk_tokens: int, most: int) -> tuple[int, ...]:
    """The numbers of tokens that occur: batches times a draft's tokens and one, and chunks of prompts."""
    batches = (size * (drafts + 1) for size in SIZES)
    return tuple(sorted({size for size in (*batches, *SIZES, chunk_tokens) if size <= most}))


def tune(
    works: Sequence[Work],
    gpu: Gpu,
    out: Path,
    meter: Meter | None,
    sizes: Sequence[int] = SIZES,
    budget_s: float = math.inf,
    progress: Progress = lambda work, what, done, of: None,
) -> Iterator[Tuned]:
    """Files and journal go to `out`; yields what became of each problem when its file is written. Each
    problem gets an equal share of the time that is left."""
    folder, began = folder_of(out, gpu.name), now()
    full, between = interleave_keys(KEYS, sizes)
    with closing(Journal(out / "journal.sqlite", gpu.name, _triton.VERSION)) as journal:
        for n, work in enumerate(works):
            share = (began + budget_s - now()) / (len(works) - n)
            search = Search(
                work.tunable,
                partial(_task, work),
                gpu,
                journal,
                meter,
                full,
                between,
                compile_until=now() + share * (COMPILING_SHARE if meter else 1.0),
                deadline=now() + share if meter else math.inf,
                progress=partial(progress, work),
            )
            yield _finished(work, search, folder / work.tunable.FILE)


def _task(work: Work, tokens: int) -> Task:
    found: Task = work.tunable.task(work.problem, tokens)
    return found


def _finished(work: Work, search: Search, file: Path) -> Tuned:
    """Writes what there is, also when it is interrupted."""
    entries: list[Entry] = []
    try:
        entries.extend(search.entries())
    finally:
        if entries:
            merge(file, work.tunable, entries)
    return Tuned(work, tuple(entries), search.report, file)
