"""What a grid of server configurations is made of: the verdicts, the load, what a measurement brings.

Verdict    what became of a cell
Load       what the server of every cell is asked
Row        one line of a measurement, with the fields of `firebox bench --json`
Measured   rows, and why their output cannot be believed
Measure    the guarded benchmark, as this room calls it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Protocol

import msgspec

from firebox.bench.base import Finding


class Verdict(StrEnum):
    """What became of a cell. Only STABLE is a configuration to use."""

    STABLE = "STABLE"
    GARBAGE = "GARBAGE"
    REPETITION = "REPETITION"
    OUT_OF_SHARED_MEMORY = "OUT_OF_SHARED_MEMORY"
    ILLEGAL_INSTRUCTION = "ILLEGAL_INSTRUCTION"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    COMPILE_ERROR = "COMPILE_ERROR"
    NCCL = "NCCL"
    HANG = "HANG"
    STARTUP_TIMEOUT = "STARTUP_TIMEOUT"
    INFEASIBLE = "INFEASIBLE"
    UNKNOWN = "UNKNOWN"


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What every cell is asked, at each `concurrency`: `requests` for each place, of `prompt_tokens` in and
    `output_tokens` out, `repeats` times."""

    concurrency: tuple[int, ...] = (1, 4)
    prompt_tokens: int = 512
    output_tokens: int = 128
    requests: int = 4
    repeats: int = 3


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One concurrency. Fields as in `firebox bench`; rates in tokens/s, times in ms as {p50, p90, p99}.

    `repeats`: output_tok_s_wall of each repetition, for ties. `error`: the first failed request's. `why`:
    reasons for a verdict that is not "ok".
    """

    concurrency: int
    requests: int
    failed: int
    verdict: str
    output_tok_s_wall: float | None = None
    output_tok_s_sum: float | None = None
    ttft_ms: Mapping[str, float] | None = None
    tpot_ms: Mapping[str, float] | None = None
    tokens_counted_by: str = ""
    repeats: tuple[float, ...] = ()
    error: str | None = None
    why: tuple[str, ...] = ()


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a measurement brought.

    `ended`: "complete"; "silent": no answer moved for silence_s; "deadline": there was no time for all rows;
    "dead": `alive` said that the server is gone.
    """

    rows: tuple[Row, ...] = ()
    findings: tuple[Finding, ...] = ()
    ended: str = "complete"


class Measure(Protocol):
    """The guarded benchmark of one server.

    It returns within `deadline_s` seconds, and within `silence_s` after the last piece of any answer came
    while answers are due. It asks `alive` now and then, and gives up once that is False. A request that fails
    is counted in its row, and raises nothing.
    """

    def __call__(
        self, url: str, load: Load, *, deadline_s: float, silence_s: float, alive: Callable[[], bool]
    ) -> Measured:
        """Measures the server at `url` (without /v1)."""
        ...
