"""Which tile for which number of tokens: the order of the compiles, and the choice among those that ran.

SGLang reads a tile for each product, and sorts rows once for both, so the two have the same BLOCK_SIZE_M.
vLLM reads one tile for both products. Both want the least time of the two together.

    compile_order(goals, space, gpu) → [Wanted, …]     what promises most comes first, by estimate
    best(goal, usages, gpu) → Pair | None              the choice, by what the compiler said
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from firebox.hardware.base import Gpu
from firebox.planning._foreign_kernel import Tile
from firebox.tuning.servers.products import Product
from firebox.tuning.servers.tiles import GROUP_M, Wanted, estimated, too_large
from firebox.tuning.servers.times import Usage, predicted_us


@dataclass(frozen=True)
class Choice:
    """A tile with its order of programs, and its predicted time for one product."""

    tile: Tile
    group_m: int
    us: float


@dataclass(frozen=True)
class Pair:
    """The choices for both products."""

    first: Choice
    second: Choice

    @property
    def us(self) -> float:
        """Of both, one after the other."""
        return self.first.us + self.second.us


@dataclass(frozen=True)
class Goal:
    """One entry, or SGLang's two: the products, the number of tokens; `alike`: one tile for both products."""

    first: Product
    second: Product
    tokens: int
    alike: bool


def compile_order(goals: Sequence[Goal], space: Sequence[Tile], gpu: Gpu) -> list[Wanted]:
    """Every compile of the space that could fit, once. First what each goal needs for its best rows a block,
    then for its second best, …; then the runners-up of each, and so on. What should spill comes last."""
    estimates = {
        Wanted(tile, down): estimated(tile, product.operands)
        for tile in space
        for down, product in ((False, goals[0].first), (True, goals[0].second))
        if not too_large(tile, product.operands, gpu)
    }
    found: list[Wanted] = []
    for spills in (False, True):
        usages = {one: estimate for one, estimate in estimates.items() if estimate.spills is spills}
        ranks = [sorted(ranked(goal, usages, gpu).values(), key=lambda rows: rows[0].us) for goal in goals]
        found += _rounds(ranks)
    return list(dict.fromkeys(found))


def best(goal: Goal, usages: Mapping[Wanted, Usage], gpu: Gpu) -> Pair | None:
    """The fastest; None where nothing is left for one of the products."""
    firsts = [pairs[0] for pairs in ranked(goal, usages, gpu).values()]
    return min(firsts, key=lambda pair: pair.us, default=None)


def ranked(goal: Goal, usages: Mapping[Wanted, Usage], gpu: Gpu) -> dict[int, list[Pair]]:
    """Rows a block → pairs, the fastest first; ties go to the one that needs less shared memory, then to the
    one that comes first in `usages`."""
    if goal.alike:
        return _by_rows(_alike(goal, usages, gpu))
    first = _by_rows(_singles(goal.first, goal.tokens, usages, gpu))
    second = _by_rows(_singles(goal.second, goal.tokens, usages, gpu))
    return {
        rows: [Pair(a.first, b.second) for a, b in zip(first[rows], second[rows], strict=False)]
        for rows in first
        if rows in second
    }


_Sized = tuple[int, Pair]  # the shared bytes that break ties


def _by_rows(found: Iterator[_Sized]) -> dict[int, list[Pair]]:
    rows: dict[int, list[Pair]] = {}
    for _, pair in sorted(found, key=lambda one: (one[1].us, one[0])):
        rows.setdefault(pair.first.tile.block_m, []).append(pair)
    return dict(sorted(rows.items()))


def _singles(product: Product, tokens: int, usages: Mapping[Wanted, Usage], gpu: Gpu) -> Iterator[_Sized]:
    """Of one product; both of a pair are the same, so that its order is that of the choice."""
    for (tile, down), usage in usages.items():
        if down == product.down:
            choice = min(
                (Choice(tile, g, predicted_us(product, tokens, tile, usage, gpu, g)) for g in GROUP_M),
                key=lambda one: one.us,
            )
            yield usage.shared_bytes, Pair(choice, choice)


def _alike(goal: Goal, usages: Mapping[Wanted, Usage], gpu: Gpu) -> Iterator[_Sized]:
    for (tile, down), usage in usages.items():
        other = usages.get(Wanted(tile, True))
        if not down and other is not None:
            pairs = (
                Pair(
                    Choice(tile, g, predicted_us(goal.first, goal.tokens, tile, usage, gpu, g)),
                    Choice(tile, g, predicted_us(goal.second, goal.tokens, tile, other, gpu, g)),
                )
                for g in GROUP_M
            )
            yield max(usage.shared_bytes, other.shared_bytes), min(pairs, key=lambda pair: pair.us)


def _rounds(ranks: Sequence[Sequence[Sequence[Pair]]]) -> Iterator[Wanted]:
    """`ranks`: of each goal, its rows a block from the best to the worst; of each of those, pairs."""
    deepest = max((len(pairs) for rows in ranks for pairs in rows), default=0)
    for place in range(deepest):
        for position in range(max(map(len, ranks))):
            for rows in ranks:
                if position < len(rows) and place < len(rows[position]):
                    pair = rows[position][place]
                    yield Wanted(pair.first.tile, False)
                    yield Wanted(pair.second.tile, True)
