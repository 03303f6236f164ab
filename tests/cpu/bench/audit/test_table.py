"""Tables in every format, and numbers as people write them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firebox.bench.audit.table import Number, number, read
from firebox.errors import ConfigError


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("12", Number(12.0)),
        ("**1,234.5** tok/s", Number(1234.5, None, "tok/s")),
        ("12.3 ± 0.4", Number(12.3, 0.4)),
        ("770,513.00 ± 90.00", Number(770_513.0, 90.0)),
        ("12.3 (±0.4)", Number(12.3, 0.4)),
        ("12.3 +/- 0.4 ms", Number(12.3, 0.4, "ms")),
        ("1.2k", Number(1200.0)),
        ("1.2k ± 0.1", Number(1200.0, 100.0)),
        ("16K", Number(16_000.0)),
        ("3.4 s", Number(3.4, None, "s")),
        ("850ms", Number(850.0, None, "ms")),
        ("1.8 kB", None),
        ("95 %", None),
        ("[144.6](https://example.org/log)", Number(144.6)),
        ("`61.9`[^2]", Number(61.9)),
        ("~20 tok/s", Number(20.0, None, "tok/s")),
        ("12,5", Number(12.5)),
        ("1 234,5", Number(1234.5)),
        ("1e3", Number(1000.0)),
        ("-0.5", Number(-0.5)),
        ("88<br>", Number(88.0)),
        ("OOM", None),
        ("—", None),
        ("n/a", None),
        ("142-156", None),
        ("3/4 failed", None),
        ("inf", None),
        ("", None),
    ],
)
def test_number(cell: str, expected: Number | None) -> None:
    assert number(cell) == expected


WRITTEN = ("{:.2f}", "{:,.2f}", "**{:.2f}**", "{:.2f} tok/s", "≈ {:,.2f}", "{:.2f}ms")


@given(st.floats(0.01, 1e7), st.sampled_from(WRITTEN))
def test_a_written_number_is_read_back(value: float, written: str) -> None:
    found = number(written.format(value))
    assert found is not None and found.value == float(f"{value:.2f}")


MARKDOWN = """
# A report | with a pipe

| a | **b** (ms) |  |
|:--|---:|---|
| x \\| y | 1 | note |
| z | 2 |

Between the tables.

a | c
--|--
1 | 3
"""


def test_all_tables_of_a_document() -> None:
    first, second = read(MARKDOWN)
    assert first.headers == ("a", "b (ms)", "")
    assert first.rows == ({"a": "x \\| y", "b (ms)": "1"}, {"a": "z", "b (ms)": "2"})
    assert (second.headers, second.rows) == (("a", "c"), ({"a": "1", "c": "3"},))


def test_a_heading_that_occurs_twice_is_kept_twice() -> None:
    (table,) = read("a,b,a\n1,2,3\n")
    assert table.rows == ({"a": "1", "b": "2", "a #2": "3"},)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separated(separator: str) -> None:
    text = "\n".join(separator.join(row) for row in (["x", "y z"], ["1", '"2"'], ["", "4"]))
    (table,) = read(text)
    assert table.rows == ({"x": "1", "y z": "2"}, {"y z": "4"})


def test_json_in_four_shapes() -> None:
    row = {"concurrency": 8, "ttft_ms": {"p50": 1.5}, "raw": [1, 2], "none": None, "on": True}
    expected = ({"concurrency": "8", "ttft_ms.p50": "1.5", "on": "true"},)
    shapes = (json.dumps([row]), json.dumps({"v": 1, "rows": [row]}), json.dumps(row, indent=1))
    for text in (*shapes, json.dumps(row) + "\n"):
        assert read(text)[0].rows == expected
    assert read(json.dumps(row) + "\n" + json.dumps(row))[0].rows == expected * 2


@pytest.mark.parametrize("text", ["", "just prose", "[]", '{"rows": []}', "[1, 2]", '{"a": 1', "|a|\n|-|\n"])
def test_no_table_is_a_wrong_call(text: str) -> None:
    with pytest.raises(ConfigError):
        read(text)
