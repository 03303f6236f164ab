"""How far an estimate is off, learned from what has been measured: a Gaussian process over the logarithm of
measured by estimated time. Tiles that are alike, at numbers of tokens that are alike, are wrong alike.

    E. Brochu, V. Cora, N. de Freitas: A Tutorial on Bayesian Optimization (2010), sections 2 and 3
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

OF_TILES, OF_ALL = 0.32, 0.2  # how far off estimates are: from tile to tile, and all of them together
NOISE = 0.01  # of a measurement
# Over these distances errors lose 40 % of what they have in common: octaves, and stages.
TOKENS_APART, NUMBERS_APART, STAGES_APART = 2.4, 1.1, 1.25


def features(tokens: int, numbers: Mapping[str, Any]) -> Array:
    """A tile as a point: `numbers` of its config by name, in a fixed order."""
    found = [math.log2(tokens) / TOKENS_APART]
    for name in sorted(numbers):
        value = float(numbers[name])
        found.append(value / STAGES_APART if name == "stages" else math.log2(1 + value) / NUMBERS_APART)
    return np.array(found)


class Surrogate:
    """One part's errors, over all tasks of a problem."""

    def __init__(self) -> None:
        self._points: list[Array] = []
        self._errors: list[float] = []

    def learn(self, point: Array, error: float) -> None:
        """`error`: ln(measured / estimated)."""
        self._points.append(point)
        self._errors.append(error)

    def predict(self, points: Sequence[Array]) -> tuple[Array, Array]:
        """Expected errors and their standard deviations."""
        at, spread = np.stack(points), OF_TILES**2 + OF_ALL**2
        if not self._points:
            return np.zeros(len(at)), np.full(len(at), math.sqrt(spread))
        known = np.stack(self._points)
        own = _alike(known, known) + NOISE**2 * np.eye(len(known))
        across = _alike(at, known)
        solved = np.linalg.solve(own, across.T)
        variance = spread - (across * solved.T).sum(1)
        return solved.T @ np.array(self._errors), np.sqrt(np.maximum(variance, 1e-9))


def _alike(a: Array, b: Array) -> Array:
    squares = (a[:, None] - b[None]) ** 2
    found: Array = OF_TILES**2 * np.exp(-squares.sum(-1) / 2) + OF_ALL**2 * np.exp(-squares[..., 0] / 4)
    return found
