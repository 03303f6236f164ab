from __future__ import annotations

import itertools

import pytest

from firebox.errors import ConfigError
from firebox.matrix.skip import Skip

AXES = {"attention": ("x", "y=z", "and"), "ep": (1, 2, 4), "moe": ("triton", "marlin"), "on": (True, False)}
COMBINATIONS = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('attention = "x" and ep > 1', lambda v: v["attention"] == "x" and v["ep"] > 1),
        ('attention == "y=z"', lambda v: v["attention"] == "y=z"),
        ("attention = 'and' or ep != 2", lambda v: v["attention"] == "and" or v["ep"] != 2),
        ('not (moe = "marlin" and ep in [1, 4])', lambda v: not (v["moe"] == "marlin" and v["ep"] in (1, 4))),
        ("1 < ep <= 4", lambda v: 1 < v["ep"] <= 4),
        ("ep not in (1, 2) and on = True", lambda v: v["ep"] == 4 and v["on"]),
        (
            'moe = "triton" or moe = "marlin" and ep = 1',
            lambda v: v["moe"] == "triton" or (v["moe"] == "marlin" and v["ep"] == 1),
        ),
    ],
)
def test_an_expression_means_what_python_means_by_it(text, same):
    skip = Skip(text, AXES)
    assert [skip.holds(values) for values in COMBINATIONS] == [same(values) for values in COMBINATIONS]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("__import__('os').system('true')", "has", "comparisons"),
        ("ep > len([1])", "has 'len([1])'", "an axis, a value"),
        ("ep.__class__ = 1", "has 'ep.__class__'", "an axis, a value"),
        ("ep", "has 'ep'", "comparisons"),
        ("ep + 1 = 2", "has 'ep + 1'", "an axis, a value"),
        ("[c for c in (1,)] = ep", "has", "an axis, a value"),
        ("lambda: 1", "has", "comparisons"),
        ("ep is 1", "has", "comparisons"),
        ("atention = 'x'", "names no axis 'atention'", "did you mean 'attention'"),
        ('moe = "tritn"', "no value of the axis is 'tritn'", "did you mean 'triton'"),
        ("ep in [1, 3]", "no value of the axis is 3", "1, 2, 4"),
        ("ep >", "is no expression", "attention"),
        ("", "is no expression", "attention"),
        ("'x", "is no expression", "attention"),
    ],
)
def test_what_is_no_constraint_is_refused_when_it_is_read(text, message, hint):
    with pytest.raises(ConfigError) as refused:
        Skip(text, AXES)
    assert message in str(refused.value)
    assert hint in refused.value.hint


def test_values_that_have_no_order_are_refused_with_the_combination():
    with pytest.raises(ConfigError, match="cannot be judged for attention = 'x'"):
        Skip("attention > 1", AXES).holds(COMBINATIONS[0])
