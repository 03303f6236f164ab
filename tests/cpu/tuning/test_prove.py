"""Paired proof: what counts as a gain, over measurements that drift and jitter as a GPU's do."""

from __future__ import annotations

import random

from firebox.tuning.prove import Gain, compare, worth_installing


def measured(gain: float, seed: int) -> Gain:
    """Before and after differ by `gain`; everything drifts by a fifth, with half a percent of noise."""
    rng, calls = random.Random(seed), [0]

    def measure(ms: float) -> float:
        calls[0] += 1
        return ms * (1 + 0.01 * calls[0]) * (1 + rng.gauss(0, 0.005))

    return compare("decode", [lambda: measure(10.0), lambda: measure(10.0 / (1 + gain))], pairs=10)


def test_a_gain_of_two_percent_is_found_in_spite_of_drift() -> None:
    for seed in range(20):
        found = measured(0.02, seed)
        assert found.gains and not found.loses
        assert abs(found.share.value - 0.02) < 0.012


def test_no_gain_is_no_gain() -> None:
    certain = sum(measured(0.0, seed).gains or measured(0.0, seed).loses for seed in range(40))
    assert certain <= 6  # five percent of them would be


def test_a_loss_anywhere_keeps_the_file_out() -> None:
    gain, nothing, loss = measured(0.05, 1), measured(0.0, 3), measured(-0.05, 2)
    assert loss.loses
    assert worth_installing([gain, nothing])
    assert not worth_installing([gain, loss])
    assert not worth_installing([nothing])
