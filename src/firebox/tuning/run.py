"""Tunes a model: each distinct problem of its layers in turn, within one budget, and writes the files as it
goes.

What is found is on disk after every problem, and in the journal after every measurement: whoever stops it, or
kills it, keeps what there is and goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any

from firebox.bench.timer import now
from firebox.hardware.base import Gpu
from firebox.kernels import _triton
from firebox.tuning.base import Task
from firebox.tuning.entries import Entry, interleave_keys
from firebox.tuning.journal import Journal
from firebox.tuning.search import KEYS, Meter, Report, Search
from firebox.tuning.spread import Compile, Places
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
    places: Places,
    sizes: Sequence[int] = SIZES,
    budget_s: float = math.inf,
    progress: Progress = lambda work, what, done, of: None,
) -> Iterator[Tuned]:
    """Files and journal go to `out`; yields what became of each problem when its file is written. As many
    problems at a time as there are GPUs to measure on, one if there are none."""
    meters = Queue[Meter | None]()
    for meter in places.meters or (None,):
        meters.put(meter)
    at_a_time, ends = meters.qsize(), now() + budget_s
    turn = Lock()

    def one(n: int) -> Tuned:
        meter = meters.get()
        try:
            # of the time that is left an equal share for each problem that has not begun
            share = (ends - now()) / math.ceil((len(works) - n) / at_a_time)
            return _tuned(works[n], gpu, out, meter, places.compile, sizes, share, progress, turn)
        finally:
            meters.put(meter)

    if at_a_time == 1:
        yield from map(one, range(len(works)))
        return
    with ThreadPoolExecutor(at_a_time) as pool:
        yield from pool.map(one, range(len(works)))


def _tuned(
    work: Work,
    gpu: Gpu,
    out: Path,
    meter: Meter | None,
    compile: Compile,
    sizes: Sequence[int],
    share_s: float,
    progress: Progress,
    turn: Lock,
) -> Tuned:
    full, between = interleave_keys(KEYS, sizes)
    began = now()
    with closing(Journal(out / "journal.sqlite", gpu.name, _triton.VERSION)) as journal:
        search = Search(
            work.tunable,
            partial(_task, work),
            gpu,
            journal,
            meter,
            compile,
            full,
            between,
            compile_until=began + share_s * (COMPILING_SHARE if meter else 1.0),
            deadline=began + share_s if meter else math.inf,
            progress=partial(progress, work),
        )
        return _written(work, search, folder_of(out, gpu.name) / work.tunable.FILE, turn)


def _task(work: Work, tokens: int) -> Task:
    found: Task = work.tunable.task(work.problem, tokens)
    return found


def _written(work: Work, search: Search, file: Path, turn: Lock) -> Tuned:
    """Writes what there is, also when it is interrupted."""
    entries: dict[int, Entry] = {}
    try:
        for entry in search.entries():
            entries[entry.task.tokens] = entry
    finally:
        with turn:
            if entries:
                merge(file, work.tunable, entries.values())
    return Tuned(work, tuple(entries.values()), search.report, file)
