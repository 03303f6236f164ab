"""What a workload is: a file with `phases(prompts, options)`, and `DEFAULTS`, the options it takes where the
user gives none.

A workload returns the same phases, in the same order and with the same axes, each time it is asked with the
same options; the prompts differ. So one call a repetition gives rows that can be averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from firebox.bench.base import Phase
from firebox.bench.prompts import Prompts
from firebox.errors import ConfigError
from firebox.find import load, names


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a user may choose of a workload; lengths in tokens.

    `requests`: a place's share, so a phase sends concurrency × requests. `rates_per_s`: of timed arrivals.
    `turns`: of a conversation. `file`: a data set. `repeat`: runs of every phase. `context_tokens`: the
    longest request the server takes; phases beyond it are left out.
    """

    concurrency: tuple[int, ...] = (1,)
    prompt_tokens: tuple[int, ...] = (512,)
    output_tokens: tuple[int, ...] = (128,)
    depth_tokens: tuple[int, ...] = (0,)
    rates_per_s: tuple[float, ...] = ()
    requests: int = 4
    turns: int = 4
    file: Path | None = None
    repeat: int = 3
    context_tokens: int | None = None

    def fits(self, tokens: int) -> bool:
        """Whether a request of so many tokens, prompt and answer, can be sent."""
        return self.context_tokens is None or tokens <= self.context_tokens


class Workload(Protocol):
    """A file of this folder. `DEFAULTS`: fields of Options that it sets where the user does not."""

    DEFAULTS: Mapping[str, Any]

    def phases(self, prompts: Prompts, options: Options) -> list[Phase]:
        """What to run, in the order of the report. Raises ConfigError for options that cannot work."""


def workload(name: str) -> Any:
    """The workload of that name; a hyphen is as good as an underscore. Raises ConfigError."""
    known = [found for found in names("bench.workloads") if found != "base"]
    if (file := name.replace("-", "_")) not in known:
        raise ConfigError(
            f"there is no workload {name!r}", hint=f"one of {', '.join(k.replace('_', '-') for k in known)}"
        )
    return load("bench.workloads", file)
