"""Few different n-grams over a window: loops with mutations, a handful of phrases shuffled again and again.

For each window of WINDOWS (in n-grams of `_grams`) the share of different ones; less than the limit is a
flood. Not for texts of FEW characters: bits and DNA repeat by nature, and one_token judges those.

Measured on 2026-11-21 over 4,064 passages of up to 5,000 characters from the Python library, the files of
Vim, Perl and Linux, manuals in eight languages, licences and this repository: ten of them fall below a
limit. Four are config.json files in which one item stands dozens of times; the others are tables in which
one word in ten differs. Loops in which one letter in sixty is changed have 0.17 of 1,024.

Nearest good text: tables of numbers with few values (a matrix of zeros and ones), XML whose attributes
hardly differ, tests of many cases. Missed: floods shorter than some 500 characters, and loops that change
more often than once in sixty letters.

Would have caught: the loops with small changes that suffix_loop misses, and floods of the same few tokens
in any order (vllm#49886; sgl#23467 calls it word salad).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from firebox.bench.base import Finding
from firebox.bench.guards._grams import Grams, distinct
from firebox.bench.guards.base import excerpt

WINDOWS = {256: 0.09, 512: 0.075, 768: 0.16, 1024: 0.18, 2048: 0.115}
FEW = 4  # different characters: DNA and bits repeat by nature; one_token judges such texts
_KEPT = max(WINDOWS)


class Guard:
    """One channel of one stream. Keeps the last n-grams."""

    def __init__(self) -> None:
        self._grams = Grams()
        self._last = np.zeros(0, np.uint64)

    def see(self, block: str) -> Finding | None:
        """Whether the last window is a flood."""
        self._last = np.concatenate([self._last, self._grams.feed(block)])[-_KEPT:]
        return _judge(self._last, block)

    def end(self, rest: str) -> Finding | None:
        """The same, up to the end."""
        return _judge(np.concatenate([self._last, self._grams.peek(rest)]), rest)


def _judge(grams: NDArray[np.uint64], text: str) -> Finding | None:
    for window, limit in WINDOWS.items():
        if len(grams) < window or len(set(text)) <= FEW:
            return None
        if (share := distinct(grams[-window:])) < limit:
            why = (
                f"{share:.0%} of the last {window} n-grams are different (limit "
                f"{limit:.0%}): …{excerpt(text)}"
            )
            return Finding(guard="ngram_flood", verdict="repetition", why=why)
    return None
