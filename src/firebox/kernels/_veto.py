"""Choices that are not made again in this process: before the port opened their launches did not compile or
fit (engine/launch_plan.py), raised, or gave a wrong result (engine/self_test.py). Whoever chooses a path or a
tile asks here, and takes the next candidate.

A choice is a tuple of its operation, its problem, the path's name and its configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

from firebox.errors import LaunchRefused

Choice = tuple[Hashable, ...]
C = TypeVar("C")
_VETOED: dict[Choice, str] = {}
_FORGET: list[Callable[[], None]] = []  # empties what remembers choices


def veto(choice: Choice, why: str) -> None:
    """From now on another one. `why`: what it was, and how it failed. What was chosen before is chosen again,
    but layers that are built keep it."""
    _VETOED[choice] = why
    _forget()


def lift() -> None:
    """Every choice may be made again."""
    _VETOED.clear()
    _forget()


def why_not(choice: Choice) -> str | None:
    """Why it must not be made, or None."""
    return _VETOED.get(choice)


def first_allowed(candidates: Iterable[C], choice_of: Callable[[C], Choice], what: str) -> tuple[C, str]:
    """The first candidate without a veto, and "" or what it stands in for. Raises LaunchRefused,
    naming `what`, if there is none."""
    failed: list[str] = []
    for candidate in candidates:
        why = why_not(choice_of(candidate))
        if why is None:
            return candidate, f"; instead of {failed[0]}" if failed else ""
        failed.append(why)
    raise LaunchRefused(
        f"no launch of {what} is left: {'; '.join(dict.fromkeys(failed))}",
        hint="another version of Triton or of the driver; where a tile does not fit, firebox tune finds one; "
        "where one failed its test, --self-test off starts all the same",
    )


def remembers(function: Any) -> Any:
    """Marks a cached function whose results depend on vetoes."""
    _FORGET.append(function.cache_clear)
    return function


def _forget() -> None:
    for forget in _FORGET:
        forget()
