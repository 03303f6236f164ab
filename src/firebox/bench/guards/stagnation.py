"""No new vocabulary for a long stretch: everything that comes has come at least twice before.

The n-grams of `_grams` are the vocabulary. Over each stretch of STRETCHES, those that had not yet been seen
in two earlier blocks are less than the limit: the text goes round, in however long a circle and in whatever
order. It takes a third round to tell: copying a text once is what good answers do, such as code that is
shown whole again after a change.

Measured on 2,032 of the passages of `ngram_flood`, exactly and without sampling: the least shares of good
ones were 2.8, 5.1 and 5.9 % of 1,536 n-grams and 6.6, 10.8 and 13.7 % of 3,072. Ten to twenty sentences in
ever new order have 5.4 to 9.5 % of 3,072; a circle has none. Nearest good text: keyboard tables, choruses;
bits, after some 3,000 of them.

Would have caught: answers that go round in several paragraphs, longer than suffix_loop can see, at full
speed to the limit of the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from firebox.bench.base import Finding
from firebox.bench.guards._grams import Grams
from firebox.bench.guards.base import BLOCK, excerpt

STRETCHES = {6: 0.02, 12: 0.1}  # blocks → which share of their n-grams must be new
_FEWEST = 64  # sampled n-grams to judge by; a stretch with fewer is a run or a flood
_SLOTS = 1 << 16  # a filter: 64 KiB a stream, a tenth of it taken after 50,000 characters
_SAMPLE = np.uint64(7)  # one n-gram in eight: chosen by its own value, so the same one every time
_SHIFT = np.uint64(64 - 16)


class Guard:
    """One channel of one stream. Remembers, for each sampled n-gram, in how many blocks it has been."""

    def __init__(self) -> None:
        self._grams = Grams()
        self._blocks_with = np.zeros(_SLOTS, np.uint8)
        self._last: deque[tuple[int, int]] = deque(maxlen=max(STRETCHES))  # (new, all) a block

    def see(self, block: str) -> Finding | None:
        """Whether the last STRETCH blocks brought nothing new."""
        slots = _slots(self._grams.feed(block))
        self._last.append((self._new(slots), len(slots)))
        here = np.unique(slots)
        self._blocks_with[here] = np.minimum(self._blocks_with[here], 2) + 1
        return _judge(list(self._last), block)

    def end(self, rest: str) -> Finding | None:
        """The same with the last, shorter block."""
        slots = _slots(self._grams.peek(rest))
        return _judge([*self._last, (self._new(slots), len(slots))], rest)

    def _new(self, slots: NDArray[np.intp]) -> int:
        return int(np.count_nonzero(self._blocks_with[slots] < 2))


def _slots(grams: NDArray[np.uint64]) -> NDArray[np.intp]:
    slots: NDArray[np.intp] = (grams[(grams & _SAMPLE) == 0] >> _SHIFT).astype(np.intp)
    return slots


def _judge(last: Sequence[tuple[int, int]], text: str) -> Finding | None:
    for stretch, limit in STRETCHES.items():
        new, seen = (sum(counts) for counts in zip(*last[-stretch:], strict=True))
        if len(last) >= stretch and seen >= _FEWEST and new < limit * seen:
            why = (
                f"{new} of {seen} sampled n-grams of the last {stretch * BLOCK} characters were new "
                f"(limit {limit:.0%}): …{excerpt(text)}"
            )
            return Finding(guard="stagnation", verdict="repetition", why=why)
    return None
