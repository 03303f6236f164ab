"""Progress bars on stderr; nothing where stderr is no terminal, or where they are not wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from firebox.engine.client import LoadProgress


@contextlib.contextmanager
def loading(model: str, *, shown: bool = True) -> Iterator[Callable[[LoadProgress], None]]:
    """A bar over the bytes of a model's weights; gives the function that moves it."""
    with _bar(DownloadColumn(), shown) as bar:
        task = bar.add_task(f"loading {model}", total=None)
        yield lambda progress: bar.update(task, completed=progress.loaded_bytes, total=progress.total_bytes)


@contextlib.contextmanager
def counting(what: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar over a count; gives the function (done, total) that moves it."""
    with _bar(MofNCompleteColumn(), shown) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar(amount: ProgressColumn, shown: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        amount,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    )
