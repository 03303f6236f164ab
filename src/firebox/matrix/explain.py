"""Which axis values explain the failures: "all 12 cells with graph=piecewise: OUT_OF_SHARED_MEMORY".

A rule is one axis value, or two of different axes, whose cells all have one and the same failure. Rules are
found one after the other: those of one value before those of two, and of these the one that explains most
cells. Cells that a rule has explained are left out afterwards, because a crash at the start hides what the
same cell would have done later: "all 8 other cells with ep=4: NCCL".

A rule may have exceptions, if at least MOSTLY of its cells agree; what no rule covers stays single.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from firebox.matrix.base import Verdict

LEAST = 2  # cells of a rule: one cell is no pattern
MOSTLY = 0.8
Terms = tuple[tuple[str, object], ...]


class Judged(msgspec.Struct, frozen=True):
    """A cell and what became of it."""

    cell: str
    axes: Mapping[str, object]
    verdict: Verdict


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """`failing` of the `matching` cells with these axis values have this verdict. `others`: cells with these
    values that earlier rules have explained."""

    verdict: Verdict
    terms: Mapping[str, object]
    cells: tuple[str, ...]
    matching: int
    others: int

    @property
    def failing(self) -> int:
        """How many cells it explains."""
        return len(self.cells)

    @property
    def sentence(self) -> str:
        """The rule in words."""
        values = " and ".join(f"{axis}={value}" for axis, value in self.terms.items())
        rest = "other " if self.others else ""
        if self.failing == self.matching:
            many = "both" if self.matching == 2 else f"all {self.matching}"
            return f"{many} {rest}cells with {values}: {self.verdict}"
        return f"{self.failing} of {self.matching} {rest}cells with {values}: {self.verdict}"


def explain(judged: Sequence[Judged]) -> tuple[Rule, ...]:
    """The rules, in the order in which they were found."""
    rules: list[Rule] = []
    left = list(judged)
    while rule := _best(left, judged):
        rules.append(rule)
        explained = set(rule.cells)
        left = [each for each in left if each.cell not in explained]
    return tuple(rules)


def unexplained(judged: Sequence[Judged], rules: Iterable[Rule]) -> tuple[Judged, ...]:
    """The failures that no rule covers."""
    explained = {cell for rule in rules for cell in rule.cells}
    return tuple(e for e in judged if e.verdict is not Verdict.STABLE and e.cell not in explained)


def _best(left: Sequence[Judged], judged: Sequence[Judged]) -> Rule | None:
    """The next rule: the shorter one first, then the one without exceptions, then the one with most cells."""
    for size, least_share in itertools.product((1, 2), (1.0, MOSTLY)):
        asked = (_rule(terms, left, judged, least_share) for terms in _conjunctions(judged, size))
        rules = [rule for rule in asked if rule is not None]
        if rules:
            return max(rules, key=lambda rule: (rule.failing, rule.failing / rule.matching))
    return None


def _conjunctions(judged: Sequence[Judged], size: int) -> Iterable[Terms]:
    """Values of axes that have more than one: the others explain nothing."""
    values: dict[str, dict[object, None]] = {}
    for each in judged:
        for axis, value in each.axes.items():
            values.setdefault(axis, {})[value] = None
    axes = [axis for axis, found in values.items() if len(found) > 1]
    for chosen in itertools.combinations(axes, size):
        for combined in itertools.product(*(values[axis] for axis in chosen)):
            yield tuple(zip(chosen, combined, strict=True))


def _rule(terms: Terms, left: Sequence[Judged], judged: Sequence[Judged], least_share: float) -> Rule | None:
    matching = [each for each in left if _holds(terms, each)]
    failures = Counter(each.verdict for each in matching if each.verdict is not Verdict.STABLE)
    if not failures:
        return None
    verdict, failing = failures.most_common(1)[0]
    if failing < LEAST or failing < least_share * len(matching):
        return None
    return Rule(
        verdict=verdict,
        terms=dict(terms),
        cells=tuple(each.cell for each in matching if each.verdict is verdict),
        matching=len(matching),
        others=sum(_holds(terms, each) for each in judged) - len(matching),
    )


def _holds(terms: Terms, each: Judged) -> bool:
    return all(each.axes[axis] == value for axis, value in terms)
