"""What tuning finds: for each number of tokens one choice, and how files write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from firebox.tuning.base import Option, Task, Tunable

PREDICTED, MEASURED = "predicted", "measured"


@dataclass(frozen=True)
class Entry:
    """The choice for one number of tokens. `how`: "predicted" or "measured"; `stock_us`: of the stock tiles,
    where they were looked at; `roof_us`: the least that the operation can take; `shared_bytes`: of each part,
    as it was compiled."""

    task: Task
    option: Option
    how: str
    stock_us: float | None = None
    roof_us: float | None = None
    shared_bytes: Mapping[str, int] = field(default_factory=dict)


def stored(entry: Entry, tunable: Tunable, **more: Any) -> dict[str, Any]:
    """An entry as files in tuned/ write it."""
    facts: dict[str, Any] = {"us": round(entry.option.us, 2), "how": entry.how}
    if entry.roof_us is not None:
        facts["of_roof"] = round(entry.roof_us / entry.option.us, 3)
    if entry.shared_bytes:
        facts["shared_bytes"] = dict(entry.shared_bytes)
    return tunable.entry(entry.option) | facts | more


def interleave_keys(keys: Sequence[int], sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`sizes` that occur → those that are searched in full, in the keys' order, and those between them."""
    full = tuple(key for key in keys if min(sizes) <= key <= max(sizes) or key in sizes)
    return full, tuple(sorted(size for size in set(sizes) if size not in full))
