"""How many distinct experts of a layer a step's tokens meet, and when what was seen voids a row's time: it is
the time of reading other weights than a spread routing reads.

If each of `tokens` chooses k of E experts uniformly and for itself, an expert stays without a token with the
probability (1 − k/E)^tokens, and two given ones do with ((E−k)(E−k−1) / (E(E−1)))^tokens. The expected number
of distinct experts and its variance follow. Experts of which only some groups may be chosen have a deviation
1 or 2 % larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

DEVIATIONS = 4.0  # of the mean of what was seen: one row of 16,000 is further off by chance
UNEVEN = 0.05  # of the expected number; routers with random weights do not choose quite uniformly either


class Routing(NamedTuple):
    """`top_k` of `experts` for each token; without shared experts, which every token takes."""

    experts: int
    top_k: int

    def expected(self, tokens: int) -> float:
        """Distinct experts of one layer in one step."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)

    def deviation(self, tokens: int) -> float:
        """The standard deviation of that number."""
        e, k = self.experts, self.top_k
        if e < 2:
            return 0.0
        idle = e * (1 - k / e) ** tokens  # experts, expected
        idle_pairs = e * (e - 1) * ((e - k) * (e - k - 1) / (e * (e - 1))) ** tokens
        return math.sqrt(max(0.0, idle + idle_pairs - idle**2))


def void(routing: Routing, tokens: int, seen: Sequence[int]) -> str | None:
    """Why `seen`, the distinct experts of each layer and step that was looked at (at least one), cannot come
    of a spread routing of so many tokens; or None."""
    mean, expected = sum(seen) / len(seen), routing.expected(tokens)
    allowed = DEVIATIONS * routing.deviation(tokens) / math.sqrt(len(seen)) + UNEVEN * expected
    if abs(mean - expected) <= allowed:
        return None
    return (
        f"{mean:.1f} distinct experts in {len(seen)} layers and steps; "
        f"spread routing gives {expected:.1f} ± {allowed:.1f}"
    )
