"""Rules against brute force."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from firebox.matrix.base import Verdict
from firebox.matrix.explain import Judged, explain, unexplained

AXES = {"moe": ("a", "b", "c"), "graph": ("off", "full", "piecewise"), "ep": (1, 2), "one": ("x",)}
FAILURES = [v for v in Verdict if v is not Verdict.STABLE]


def grid(verdict_of) -> list[Judged]:
    found = []
    for values in itertools.product(*AXES.values()):
        axes = dict(zip(AXES, values, strict=True))
        found.append(Judged("/".join(map(str, values)), axes, verdict_of(axes)))
    return found


def matching(judged, terms) -> list[Judged]:
    return [each for each in judged if all(each.axes[axis] == value for axis, value in terms.items())]


def all_terms(size: int):
    for axes in itertools.combinations(AXES, size):
        for values in itertools.product(*(AXES[axis] for axis in axes)):
            yield dict(zip(axes, values, strict=True))


def test_one_value():
    def verdict(axes):
        return Verdict.NCCL if axes["graph"] == "piecewise" else Verdict.STABLE

    (rule,) = explain(grid(verdict))
    assert rule.sentence == "all 6 cells with graph=piecewise: NCCL"
    assert len(rule.cells) == 6


def test_two_values():
    def verdict(axes):
        return Verdict.HANG if axes["moe"] == "a" and axes["ep"] == 2 else Verdict.STABLE

    (rule,) = explain(grid(verdict))
    assert rule.sentence == "all 3 cells with moe=a and ep=2: HANG"


def test_a_failure_that_comes_first_hides_another():
    def verdict(axes):
        if axes["graph"] == "piecewise":
            return Verdict.OUT_OF_SHARED_MEMORY
        return Verdict.NCCL if axes["ep"] == 2 else Verdict.STABLE

    assert [rule.sentence for rule in explain(grid(verdict))] == [
        "all 6 cells with graph=piecewise: OUT_OF_SHARED_MEMORY",
        "all 6 other cells with ep=2: NCCL",
    ]


def test_a_rule_with_exceptions_says_so():
    def verdict(axes):
        lucky = axes["moe"] == "b" and axes["ep"] == 1
        return Verdict.NCCL if axes["graph"] == "full" and not lucky else Verdict.STABLE

    (rule,) = explain(grid(verdict))
    assert rule.sentence == "5 of 6 cells with graph=full: NCCL"


def test_single_failures_have_no_pattern():
    judged = grid(lambda axes: Verdict.STABLE)
    judged[4] = Judged(judged[4].cell, judged[4].axes, Verdict.HANG)
    rules = explain(judged)
    assert rules == ()
    assert unexplained(judged, rules) == (judged[4],)


def test_axes_with_one_value_explain_nothing():
    rules = explain(grid(lambda axes: Verdict.NCCL))
    assert all("one" not in rule.terms for rule in rules)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_against_brute_force(seed):
    """With a few hidden faults: rules are true, cover whatever brute force can cover, and are no longer than
    need be."""
    random_ = random.Random(seed)
    faults = [
        (random_.choice(list(all_terms(random_.choice((1, 2))))), random_.choice(FAILURES)) for _ in range(3)
    ]

    def verdict(axes):
        for terms, found in faults:
            if all(axes[axis] == value for axis, value in terms.items()):
                return found
        return Verdict.STABLE

    judged = grid(verdict)
    rules = explain(judged)
    explained: set[str] = set()
    for rule in rules:
        left = [each for each in matching(judged, rule.terms) if each.cell not in explained]
        assert rule.matching == len(left)
        assert set(rule.cells) == {each.cell for each in left if each.verdict is rule.verdict}
        assert rule.failing >= 2 and rule.failing >= 0.8 * rule.matching
        assert rule.others == len(matching(judged, rule.terms)) - len(left)
        if len(rule.terms) == 2 and rule.failing == rule.matching:
            for axis, value in rule.terms.items():
                alone = [e for e in matching(judged, {axis: value}) if e.cell not in explained]
                assert {e.verdict for e in alone} != {rule.verdict} or len(AXES[axis]) == 1, (
                    "one value would do"
                )
        explained |= set(rule.cells)
    rest = {each.cell for each in unexplained(judged, rules)}
    assert rest | explained == {each.cell for each in judged if each.verdict is not Verdict.STABLE}
    for terms in itertools.chain(all_terms(1), all_terms(2)):
        left = [each for each in matching(judged, terms) if each.cell not in explained]
        pure = {each.verdict for each in left}
        assert not (len(left) >= 2 and len(pure) == 1 and Verdict.STABLE not in pure and "one" not in terms)
