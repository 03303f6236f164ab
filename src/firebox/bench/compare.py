"""Two reports side by side.

A row of the one is compared with the row of the other that has the same workload, axes and concurrency: by
Welch's interval over their repetitions, as the two were measured apart. Over all rows together the pairs are
the rows: the mean of log ratios with Student's interval, so that the gain is a geometric mean and no row
counts for more because its numbers are larger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from firebox.bench.statistics import Mean, difference, mean, paired
from firebox.errors import ConfigError

MEASURES = {"output_tok_s_wall": "tok/s wall", "ttft_ms": "TTFT", "tpot_ms": "TPOT"}


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """One measure of one row in both reports. `change`: second over first, minus one, with its interval;
    None where a report has no number. `verdicts` of the two rows."""

    row: str
    measure: str
    first: float | None
    second: float | None
    change: Mean | None
    verdicts: tuple[str, str]

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves no doubt that they differ."""
        return self.change is not None and not self.change.low <= 0.0 <= self.change.high


class Gain(msgspec.Struct, frozen=True, kw_only=True):
    """A geometric mean of `rows` ratios, minus one, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float
    rows: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """`overall`: per measure second over first; None with fewer than two pairs. `alone`: rows that only one
    report has."""

    pairs: tuple[Pair, ...]
    overall: Mapping[str, Gain | None]
    alone: tuple[str, ...]


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> Comparison:
    """Of two reports as `document` makes them. Raises ConfigError when they have no row in common."""
    a, b = _by_key(first["rows"]), _by_key(second["rows"])
    common = [key for key in a if key in b]
    if not common:
        raise ConfigError(
            "the two reports have no row in common", hint="they need the same workload and axes"
        )
    pairs = tuple(_pair(key, measure, a[key], b[key]) for key in common for measure in MEASURES)
    return Comparison(
        pairs=pairs,
        overall={measure: _overall([p for p in pairs if p.measure == measure]) for measure in MEASURES},
        alone=tuple(sorted(set(a) ^ set(b))),
    )


def _by_key(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    def key(row: Mapping[str, Any]) -> str:
        axes = ", ".join(f"{name} {value}" for name, value in row["axes"].items())
        return f"{row['workload']}, concurrency {row['concurrency']}, {axes}"

    return {key(row): row for row in rows}


def _pair(key: str, measure: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Pair:
    first, second = a["samples"].get(measure, []), b["samples"].get(measure, [])
    verdicts = (a["verdict"], b["verdict"])
    if not first or not second:
        return Pair(row=key, measure=measure, first=None, second=None, change=None, verdicts=verdicts)
    base, gap = mean(first).value, difference(first, second)
    half = None if gap.half_width is None else gap.half_width / base
    change = Mean(gap.value / base, half, gap.n)
    return Pair(
        row=key, measure=measure, first=base, second=mean(second).value, change=change, verdicts=verdicts
    )


def _overall(pairs: Sequence[Pair]) -> Gain | None:
    both = [(math.log(p.first), math.log(p.second)) for p in pairs if p.first and p.second]
    if len(both) < 2:
        return None
    found = paired(*zip(*both, strict=True))
    value, low, high = (math.expm1(end) for end in (found.value, found.low, found.high))
    return Gain(value=value, low=low, high=high, rows=found.n)
