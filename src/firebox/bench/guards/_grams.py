"""What a text repeats, told by its n-grams: stretches of N characters, each as a 64-bit number.

Characters, not words: Chinese has no spaces and a table no words. Runs of one character count as two of it,
so that rulers, indentation and padding are no repetition.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

N = 8  # characters: longer ones are new wherever a letter changed, shorter ones repeat in any DNA string
RUN = 2  # characters of a run that count
_B = np.uint64(0x9E3779B97F4A7C15)  # odd, so that powers of it lose nothing modulo 2^64
_B2, _B4 = (np.uint64(pow(int(_B), power, 1 << 64)) for power in (2, 4))


class Grams:
    """Turns a stream into the numbers of its n-grams, block by block."""

    def __init__(self) -> None:
        self._raw = np.zeros(0, np.uint32)  # the last RUN characters
        self._kept = np.zeros(0, np.uint64)  # the last N - 1 of those that count

    def feed(self, block: str) -> NDArray[np.uint64]:
        """The n-grams that end in `block`. [grams], one for each character that counts."""
        kept = self._join(block)
        self._raw = np.concatenate([self._raw, code_points(block)])[-RUN:]
        self._kept = kept[-(N - 1) :]
        return _hashes(kept)

    def peek(self, block: str) -> NDArray[np.uint64]:
        """The same, and the stream stays where it was."""
        return _hashes(self._join(block))

    def _join(self, block: str) -> NDArray[np.uint64]:
        points = np.concatenate([self._raw, code_points(block)])
        counts = np.ones(len(points), np.bool_)
        counts[RUN:] = (points[RUN:] != points[1:-1]) | (points[RUN:] != points[:-RUN])
        return np.concatenate([self._kept, points[counts & (np.arange(len(points)) >= len(self._raw))]])


def code_points(text: str) -> NDArray[np.uint32]:
    """[characters] uint32. Lone surrogates are points like others."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def distinct(grams: NDArray[np.uint64]) -> float:
    """Which share of the n-grams a reader would not have seen in them before; 1 for none."""
    if not len(grams):
        return 1.0
    ordered = np.sort(grams)
    return (1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))) / len(grams)


def _hashes(kept: NDArray[np.uint64]) -> NDArray[np.uint64]:
    if len(kept) < N:
        return np.zeros(0, np.uint64)
    pairs = kept[:-1] * _B + kept[1:]
    fours = pairs[:-2] * _B2 + pairs[2:]
    eights = fours[:-4] * _B4 + fours[4:]
    return (eights ^ (eights >> np.uint64(29))) * _B
