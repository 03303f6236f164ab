"""Few different n-grams over a window: loops with mutations, a handful of phrases shuffled again and again.

For each window of WINDOWS (in n-grams of `_grams`) the share of different ones; less than the limit is a flood.
Measured on 2026-11-21 over 4,114 passages of up to 5,000 characters from the Python library, Vim's, Perl's and
Linux' files, manuals in eight languages, licences and this repository: the least share of a passage is below
these limits in seven, all of them lists in which one item stands dozens of times (`"linear_attention",` in a
config.json; rows of zeros); its 0.5 % quantile is 0.41, 0.33, 0.30 and 0.26. Greedy loops of the bundled
model have 0.02 to 0.15.

Nearest good text: tables of numbers with few values, XML whose attributes hardly differ, tests of many cases.

Would have caught: the loops with small changes that suffix_loop misses, and floods of the same few tokens in
any order (vllm#49886; sgl#23467 calls it word salad).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from firebox.bench.base import Finding
from firebox.bench.guards._grams import Grams, distinct
from firebox.bench.guards.base import excerpt

WINDOWS = {256: 0.09, 512: 0.115, 1024: 0.18, 2048: 0.115}
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
        if len(grams) < window:
            return None
        if (share := distinct(grams[-window:])) < limit:
            why = f"{share:.0%} of the last {window} n-grams are different (limit {limit:.0%}): …{excerpt(text)}"
            return Finding(guard="ngram_flood", verdict="repetition", why=why)
    return None
