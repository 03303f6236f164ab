"""Reports in every form, from one measurement of a simulated server; the page in a real browser."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from firebox.bench.base import Ask, Finding, Phase, Session
from firebox.bench.client import Client, Target
from firebox.bench.compare import compare
from firebox.bench.drive import Run, drive
from firebox.bench.report.base import Report
from firebox.bench.report.columns import table
from firebox.bench.report.document import document
from firebox.bench.report.html import html
from firebox.bench.report.text import as_csv, markdown
from firebox.bench.row import summarise, withhold
from firebox.bench.store import find, save
from firebox.bench.tokens import count
from firebox.errors import ConfigError
from tests.support.browser import open_page
from tests.support.simulated_server import Behaviour, simulated


def measured(url: str, concurrency: int) -> list[Run]:
    sessions = (Session(asks=(Ask(prompt="one two", max_tokens=20),)),) * (2 * concurrency)
    axes = {"prompt_tokens": 2, "output_tokens": 20}
    phase = Phase(workload="quick", concurrency=concurrency, sessions=sessions, axes=axes)

    async def main() -> Run:
        async with Client(Target(url=url, model="simulated")) as client:
            return await drive(client, phase)

    runs = [asyncio.run(main()) for _ in range(2)]
    for run in runs:
        count(run.answers, None)
    return runs


@pytest.fixture(scope="module")
def report() -> Report:
    with simulated(Behaviour(first_token_s=0.03, token_s=0.004)) as url:
        runs = [measured(url, concurrency) for concurrency in (1, 2, 4)]
    bad = [Finding(guard="one_token", verdict="garbage", why="'!' makes up 100 % <of> the text")]
    rows = [summarise(each, [bad] if index == 1 else []) for index, each in enumerate(runs)]
    for row in rows:
        withhold(row)
    return Report(
        url="http://127.0.0.1:1",
        model="simulated <model>",
        profile="quick",
        firebox="0",
        began="2026-11-21T10:00:00+00:00",
        seed=1,
        notes=["the server refuses ignore_eos"],
        rows=rows,
        runs=runs,
    )


def test_a_row_that_failed_shows_its_verdict_and_no_number_anywhere(report: Report) -> None:
    found = document(report)
    bad, good = found["rows"][1], found["rows"][0]
    assert bad["verdict"] == "garbage" and not found["passed"]
    numbers = [k for k, v in bad.items() if isinstance(v, float) and k.endswith(("_s", "_ms", "share"))]
    assert numbers == [] and bad["ttft_ms"] is None and bad["samples"] == {} and bad["intervals"] == {}
    assert good["output_tok_s_wall"] > 0 and set(good["ttft_ms"]) == {"p50", "p90", "p99", "mean"}
    shown = table(report.rows)
    assert [shown.cells[1][index] for index in shown.numeric] == ["GARBAGE", "–", "–", "–", "–", "–"]
    assert shown.headers[0] == "concurrency" and "prompt_tokens 2" in shown.caption


def test_markdown_and_csv_hold_the_same_numbers(report: Report) -> None:
    lines = [line for line in markdown(report).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 and lines[0].count("|") == 1 + 6 + 1 + 1
    records = list(csv.DictReader(io.StringIO(as_csv(report))))
    assert [record["verdict"] for record in records] == ["ok", "garbage", "ok"]
    assert float(records[2]["output_tok_s_wall"]) == pytest.approx(report.rows[2].output_tok_s_wall, rel=1e-5)
    assert records[1]["output_tok_s_wall"] == "" and records[1]["ttft_ms_p50"] == ""
    assert records[0]["prompt_tokens"] == "2"


def test_the_page_opens_in_a_browser_and_asks_for_nothing(report: Report, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(html(report), encoding="utf-8")
    plots, traces = ".js-plotly-plot", ".js-plotly-plot .scatterlayer .trace"
    seen = open_page(page, tmp_path / "report.png", plots, traces, wait_for=f"{plots} .main-svg")
    assert seen.problems == [] and seen.requests == []
    assert seen.counts[plots] == 4 and seen.counts[traces] >= 6
    assert "simulated <model>" in seen.title and "GARBAGE" in seen.text
    assert (tmp_path / "report.png").stat().st_size > 20_000


def test_reports_are_kept_and_found_again(report: Report, tmp_path: Path) -> None:
    store, found = tmp_path / "sub" / "results.db", document(report)
    first, second = save(store, found, "before"), save(store, {**found, "model": "other"}, "before")
    assert find(store, str(first)) == json.loads(json.dumps(found))
    assert find(store, "before")["model"] == "other" and second == first + 1
    file = tmp_path / "report.json"
    file.write_text("a line before\n" + json.dumps(found))
    assert find(store, str(file))["rows"] == json.loads(json.dumps(found))["rows"]


@pytest.mark.parametrize(("which", "says"), [("7", "holds no report"), ("gone", "holds no report")])
def test_a_report_that_is_not_there(report: Report, tmp_path: Path, which: str, says: str) -> None:
    save(tmp_path / "results.db", document(report), None)
    with pytest.raises(ConfigError, match=says):
        find(tmp_path / "results.db", which)
    (tmp_path / "no.db").write_text("this is no database, but a text that is long enough to look at")
    with pytest.raises(ConfigError, match="not a store"):
        find(tmp_path / "no.db", which)


def row(concurrency: int, *wall: float, verdict: str = "ok") -> dict[str, Any]:
    samples = {"output_tok_s_wall": list(wall)} if wall else {}
    return {
        "workload": "quick",
        "axes": {"prompt_tokens": 2},
        "concurrency": concurrency,
        "verdict": verdict,
        "samples": samples,
    }


def test_two_reports_are_compared_row_by_row_and_over_rows() -> None:
    first = {"rows": [row(1, 99, 100, 101), row(2, 180, 220), row(4, verdict="garbage"), row(8, 1.0)]}
    second = {"rows": [row(1, 109, 110, 111), row(2, 190, 250), row(4, 300.0, 301.0)]}
    found = compare(first, second)
    one, two, four = [pair for pair in found.pairs if pair.measure == "output_tok_s_wall"]
    assert one.change is not None and one.change.value == pytest.approx(0.10) and one.told_apart
    assert two.change is not None and two.change.value == pytest.approx(0.10) and not two.told_apart
    assert four.change is None and four.verdicts == ("garbage", "ok")
    gain = found.overall["output_tok_s_wall"]
    assert gain is not None and gain.rows == 2
    logs = [math.log(1.1), math.log(1.1)]
    assert gain.value == pytest.approx(math.expm1(sum(logs) / 2)) and gain.low <= gain.value <= gain.high
    assert found.alone == ("quick, concurrency 8, prompt_tokens 2",)


def test_reports_without_a_common_row_are_refused() -> None:
    with pytest.raises(ConfigError, match="no row in common"):
        compare({"rows": [row(1, 1.0)]}, {"rows": [row(2, 1.0)]})
