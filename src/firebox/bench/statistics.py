"""Means, intervals and ties. An interval is Student's, at 95 %; values are taken as independent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


class Mean(msgspec.Struct, frozen=True):
    """A mean, and half the width of its 95 % interval: None for a single value, which has none."""

    value: float
    half_width: float | None
    n: int

    @property
    def low(self) -> float:
        """The interval's lower end; minus infinity for a single value."""
        return self.value - (math.inf if self.half_width is None else self.half_width)

    @property
    def high(self) -> float:
        """The interval's upper end; infinity for a single value."""
        return self.value + (math.inf if self.half_width is None else self.half_width)


def mean(values: Sequence[float]) -> Mean:
    """The mean of at least one value."""
    assert values, "the mean of nothing"
    middle, n = float(np.mean(values)), len(values)
    if n == 1:
        return Mean(middle, None, 1)
    return Mean(middle, _t(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n), n)


def paired(first: Sequence[float], second: Sequence[float]) -> Mean:
    """The mean of the differences second - first, pair by pair."""
    assert len(first) == len(second), f"{len(first)} values against {len(second)}"
    return mean([b - a for a, b in zip(first, second, strict=True)])


def difference(first: Sequence[float], second: Sequence[float]) -> Mean:
    """The difference mean(second) - mean(first) of unpaired values, by Welch's method."""
    a, b = mean(first), mean(second)
    if a.half_width is None or b.half_width is None:
        return Mean(b.value - a.value, None, min(a.n, b.n))
    errors = [float(np.var(values, ddof=1)) / len(values) for values in (first, second)]
    if sum(errors) == 0:
        return Mean(b.value - a.value, 0.0, min(a.n, b.n))
    freedom = sum(errors) ** 2 / sum(e**2 / (n - 1) for e, n in zip(errors, (a.n, b.n), strict=True) if e)
    return Mean(b.value - a.value, _t(freedom) * math.sqrt(sum(errors)), min(a.n, b.n))


def tied(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether these values leave open which mean is greater. Single values always do."""
    gap = difference(first, second)
    return gap.low <= 0.0 <= gap.high


def percentiles(values: Sequence[float], of: Sequence[int] = (50, 90, 99)) -> dict[str, float]:
    """{"p50": …}, by linear interpolation between the two nearest of at least one value."""
    return {f"p{p}": float(v) for p, v in zip(of, np.percentile(values, of), strict=True)}


def _t(freedom: float) -> float:
    return float(stdtrit(freedom, 0.5 + CONFIDENCE / 2))
