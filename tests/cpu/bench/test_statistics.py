"""Intervals against published values and against repeated draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from firebox.bench.statistics import Mean, difference, mean, paired, percentiles, tied


def test_the_interval_of_three_values_by_hand() -> None:
    found = mean([10.0, 11.0, 12.0])
    # t(0.975, 2) = 4.302653 (any table of Student's distribution); s = 1
    assert found == Mean(11.0, pytest.approx(4.302653 / math.sqrt(3), rel=1e-6), 3)


def test_one_value_has_no_interval() -> None:
    assert mean([5.0]) == Mean(5.0, None, 1)
    assert mean([5.0]).low == -math.inf
    assert tied([5.0], [9.0])


def test_95_of_100_intervals_hold_the_truth() -> None:
    draw = np.random.default_rng(7)
    held = sum((f := mean(list(draw.normal(3.0, 1.0, 4)))).low <= 3.0 <= f.high for _ in range(4000))
    assert 0.94 < held / 4000 < 0.96
    apart = sum(
        (g := difference(list(draw.normal(3, 1, 5)), list(draw.normal(4, 2, 4)))).low <= 1.0 <= g.high
        for _ in range(4000)
    )
    assert 0.935 < apart / 4000 < 0.965


def test_pairs_see_what_the_mean_hides() -> None:
    day, night = [100.0, 50.0, 80.0, 20.0], [101.0, 51.1, 80.9, 21.0]
    assert tied(day, night)
    assert paired(day, night).low > 0


def test_equal_values_are_tied_and_exact_ones_told_apart() -> None:
    assert tied([1.0, 1.0], [1.0, 1.0])
    assert not tied([1.0, 1.0], [1.1, 1.1])


def test_percentiles() -> None:
    assert percentiles(range(101)) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
