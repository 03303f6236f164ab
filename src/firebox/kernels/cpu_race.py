"""One draw from a softmax per row on a CPU, as a race: token i finishes at E_i · exp(top − s_i), the first
one wins.

    E_i = −ln(1 − v_i),  v_i = (w_i // 256 + ½) / 2^24,
    w_i = word i mod 4 of Philox4x32-10 at counter (position, i // 4) under the key `seed`

With E_i exponentially distributed, token i wins with probability softmax(s)_i. Against inversion of the
cumulative sum: a change of 1e-5 in the scores, as another batch shape makes, changes the winner only where
two tokens finish within 1e-5 of each other, however large the vocabulary. scores [rows, vocab] float32, −inf
for what must not be drawn. Sums none; times in float64. Philox: Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011; counter-based, so a GPU draws the very same numbers. Measured: EPYC, one thread,
2026-11-21, see docs/log/2026-11-21-first-light.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from firebox.hardware.base import Gpu
from firebox.kernels._cpu import jit

# ---- 1. the problem

OP = "race"


@dataclass(frozen=True)
class Problem:
    """The vocabulary's size."""

    vocab: int


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """CPU."""
    return None if gpu.kind == "cpu" else "is made for a CPU"


# ---- 2. the device code

_MASK = np.uint64(0xFFFFFFFF)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_32 = np.uint64(32)


def _philox(seed: np.uint64, position: np.uint64, block: np.uint64, words: np.ndarray) -> None:
    """The four words of Philox4x32-10 at counter (position, block) into `words` [4] uint64."""
    c0, c1, c2, c3 = position & _MASK, position >> _32, block & _MASK, block >> _32
    k0, k1 = seed & _MASK, seed >> _32
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    words[0], words[1], words[2], words[3] = c0, c1, c2, c3


philox = jit(_philox)


def _race(scores: np.ndarray, seeds: np.ndarray, positions: np.ndarray, winners: np.ndarray) -> None:
    words = np.empty(4, np.uint64)
    for row in range(scores.shape[0]):
        top = scores[row].max()
        best, winner = np.inf, 0
        for token in range(scores.shape[1]):
            if token % 4 == 0:
                philox(seeds[row], positions[row], np.uint64(token // 4), words)
            behind = np.float64(top - scores[row, token])
            if behind < 700.0:  # e^700: later than anything that can win, and −inf
                v = (np.float64(words[token % 4] >> np.uint64(8)) + 0.5) / 16777216.0
                finish = -np.log1p(-v) * np.exp(behind)
                if finish < best:
                    best, winner = finish, token
        winners[row] = winner


_kernel = jit(_race)

# ---- 3. bind


def bind(
    problem: Problem, weights: Mapping[str, torch.Tensor], threads: int
) -> Callable[[torch.Tensor, Sequence[int], Sequence[int]], list[int]]:
    """A launcher `run(scores, seeds, positions) -> token ids`. It has no weights; seeds are taken modulo
    2^64."""

    def run(scores: torch.Tensor, seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
        winners = np.empty(len(seeds), np.int64)
        keys = np.array([seed % 2**64 for seed in seeds], np.uint64)
        _kernel(scores.numpy(), keys, np.array(positions, np.uint64), winners)
        return winners.tolist()

    return run


# ---- 4. the reference


def reference(problem: Problem, inputs: Mapping[str, Any]) -> list[int]:
    """The formula with Python's own integers and floats, token by token."""
    winners = []
    for scores, seed, position in zip(inputs["scores"], inputs["seeds"], inputs["positions"], strict=True):
        weights = (scores.double() - scores.max().double()).exp()
        words = [word for block in range(-(-problem.vocab // 4)) for word in _words(seed, position, block)]
        v = (torch.tensor(words[: problem.vocab], dtype=torch.float64) // 256 + 0.5) / 2**24
        winners.append(int((-torch.log1p(-v) / weights).argmin()))
    return winners


def _words(seed: int, position: int, block: int) -> tuple[int, int, int, int]:
    mask = 2**32 - 1
    c0, c1, c2, c3 = position & mask, position >> 32, block & mask, block >> 32
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


# ---- 5. inputs, cases, tolerance

# (problem, rows); the winners must be equal
CASES = tuple((Problem(vocab), rows) for vocab in (1, 5, 320, 3072) for rows in (1, 4))
TOLERANCE = 0.0


def inputs(case: tuple[Problem, int], seed: int = 0) -> dict[str, Any]:
    """Random scores with a third of the tokens excluded, and seeds and positions beyond 32 bits."""
    problem, rows = case
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, problem.vocab, generator=generator) * 2
    excluded = torch.rand(rows, problem.vocab, generator=generator) < 0.33
    excluded[:, 0] = False
    return {
        "scores": scores.masked_fill(excluded, -torch.inf),
        "seeds": [(2**61 + 7) * (row + 1) % 2**64 for row in range(rows)],
        "positions": [5 + row * 2**33 for row in range(rows)],
    }
