"""The two grouped products of a layer of routed experts, and how many rows, experts and blocks of rows they
have for a number of tokens.

    gate_up   [rows, hidden] · [experts, 2 · width, hidden]ᵀ      n = 2 · width, k = hidden
    down      [rows, width] · [experts, hidden, width]ᵀ           n = hidden,    k = width

A token takes `top_k` of the routed experts, all of them alike often, and each fused shared expert, so that a
routed expert's number of rows is binomial. Its rows fill whole blocks of block_m.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from firebox.planning._foreign_kernel import Operands
from firebox.planning.foreign import operands_of
from firebox.tuning.servers.names import ExpertLayers, Lookup

OUT_BYTES = 2  # of a number in the product: bf16
_BYTES = {"bf16": 2.0, "fp32": 4.0, "fp8e4nv": 1.0, "i8": 1.0, "u8": 1.0}
_SCALE_BYTES = {"group": 2, "block": 4}


@dataclass(frozen=True)
class Routing:
    """`experts`: routed ones; `top_k`: of those a token's; `fused`: shared experts that are computed with
    them."""

    experts: int
    top_k: int
    fused: int = 0

    def rows(self, tokens: int) -> int:
        """Of the product."""
        return tokens * (self.top_k + self.fused)

    def touched(self, tokens: int) -> float:
        """Experts that have rows, as expected."""
        missed = (1 - self.top_k / self.experts) ** tokens
        return self.experts * (1 - missed) + self.fused

    def blocks(self, tokens: int, block_m: int) -> float:
        """Blocks of rows, as expected."""
        fused = self.fused * -(-tokens // block_m)
        return self.experts * _blocks(tokens, self.top_k / self.experts, block_m) + fused


@functools.lru_cache(maxsize=4096)
def _blocks(tokens: int, share: float, block_m: int) -> float:
    """E⌈rows / block_m⌉ = Σ over i of P(rows > i · block_m), rows being binomial."""
    if share >= 1:
        return float(-(-tokens // block_m))
    expected, below = 0.0, 0.0
    for rows in range(tokens + 1):
        if rows % block_m == 0:
            below_or_here = below + _probability(tokens, share, rows)
            expected += max(0.0, 1 - below_or_here)
            below = below_or_here
        else:
            below += _probability(tokens, share, rows)
    return expected


def _probability(tokens: int, share: float, rows: int) -> float:
    ways = math.lgamma(tokens + 1) - math.lgamma(rows + 1) - math.lgamma(tokens - rows + 1)
    return math.exp(ways + rows * math.log(share) + (tokens - rows) * math.log1p(-share))


@dataclass(frozen=True)
class Product:
    """One of the two. `n`, `k`: columns and depth, in weights; `down`: it is the second."""

    routing: Routing
    n: int
    k: int
    operands: Operands
    down: bool

    @property
    def x_bytes(self) -> float:
        """Of a number of x."""
        return _BYTES[self.operands.x]

    @property
    def w_bytes(self) -> float:
        """Of a weight in memory, with its share of the scales."""
        one = 0.5 if self.operands.int4 else _BYTES[self.operands.w]
        return one + _SCALE_BYTES.get(self.operands.scales, 0) / math.prod(self.operands.block)

    @property
    def w_tile_bytes(self) -> float:
        """Of a weight in a tile: both halves of a byte of int4 are loaded on their own."""
        return _BYTES[self.operands.w]

    def x_rows(self, tokens: int) -> int:
        """Different rows that are read: the second product has one for each of a token's experts."""
        return self.routing.rows(tokens) if self.down else tokens


def products(layers: ExpertLayers, lookup: Lookup) -> tuple[Product, Product]:
    """gate_up and down as the server that looks so computes them."""
    shape = layers.shape
    routing = Routing(shape.experts, layers.top_k, lookup.fused)
    operands = operands_of(lookup.facts)
    return (
        Product(routing, 2 * shape.width, layers.hidden, operands, down=False),
        Product(routing, layers.hidden, shape.width, operands, down=True),
    )
