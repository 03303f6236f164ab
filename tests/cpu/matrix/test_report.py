"""The numbers of the report, from a store filled by hand."""

from __future__ import annotations

import json
import re
import tomllib
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from firebox.bench.statistics import tied
from firebox.cli.main import build
from firebox.matrix.base import Row, Verdict
from firebox.matrix.cells import cells
from firebox.matrix.html import html
from firebox.matrix.ranking import ranking
from firebox.matrix.report import heat_maps, markdown, report
from firebox.matrix.spec import parse
from firebox.matrix.store import Evidence, Result, Store
from tests.support.browser import open_page

TEXT = """
name = "speeds <of> moe"
command = "firebox serve firebox-tiny --port {port} --moe-backend {moe} --no-prefix-cache"
[axes]
moe = ["a", "b", "c"]
[axes.graph]
off = { flags = ["--cuda-graph=off"] }
on = { flags = ["--max-running-requests", "8"], env = { X = "1" } }
[[skip]]
when = 'moe = "c" and graph = "on"'
[load]
concurrency = [1, 8]
[repeat]
rounds = 2
"""
NCCL = Evidence(
    matched="NCCL <error>", last_lines=("one", "two <b>"), source="https://github.com/x/y/issues/1"
)
# cell → for each round, its throughputs at concurrency 1 and 8; None: it failed
SPEEDS = {
    ("a", "off"): [([10.0, 10.2], [50.0, 50.2]), ([10.1, 10.3], [50.1, 50.1])],
    ("a", "on"): [([10.2, 10.0], [70.0, 70.4]), ([10.1, 10.4], [70.2, 70.3])],
    ("b", "off"): [None, None],
    ("b", "on"): [([30.0, 30.0], [99.0, 99.0]), None],
    ("c", "off"): [([5.0, 5.1], [70.3, 70.5]), ([5.2, 5.0], [70.2, 70.1])],
}


def rows(at_1: list[float], at_8: list[float]) -> tuple[Row, ...]:
    return tuple(
        Row(
            concurrency=n,
            requests=4,
            failed=0,
            verdict="ok",
            output_tok_s_wall=sum(of) / len(of),
            repeats=tuple(of),
            tokens_counted_by="usage",
        )
        for n, of in ((1, at_1), (8, at_8))
    )


@pytest.fixture
def store(tmp_path) -> Store:
    found, planned = Store(tmp_path), cells(parse(TEXT))
    found.plan(TEXT, planned)
    for number in range(2):
        for cell in planned:
            speeds = SPEEDS[tuple(cell.axes.values())][number]
            failed = Result(verdict=Verdict.NCCL, cause="links", remedy="plug them", evidence=NCCL)
            good = speeds and Result(verdict=Verdict.STABLE, cause="", rows=rows(*speeds))
            found.finish(found.begin((cell.id, number), "m"), good or failed)
    found.give_up(found.begin((planned[0].id, 5), "m"))
    return found


def test_verdicts_over_rounds(store):
    found = {tuple(o.cell.axes.values()): (o.verdict, o.cause) for o in report(store).outcomes}
    assert found == {
        ("a", "off"): ("STABLE", ""),
        ("a", "on"): ("STABLE", ""),
        ("b", "off"): ("NCCL", "links"),
        ("b", "on"): ("NCCL", "in 1 of 2 rounds: links"),
        ("c", "off"): ("STABLE", ""),
    }


def test_the_document(store):
    document = report(store).document()
    assert [set(cell) >= {"cell", "axes", "verdict", "cause", "rows"} for cell in document["cells"]] == [
        True
    ] * 5
    first = document["cells"][0]
    assert first["axes"] == {"moe": "a", "graph": "off"}
    assert [(row["round"], row["concurrency"], row["output_tok_s_wall"]) for row in first["rows"]] == [
        (0, 1, pytest.approx(10.1)),
        (0, 8, pytest.approx(50.1)),
        (1, 1, pytest.approx(10.2)),
        (1, 8, pytest.approx(50.1)),
    ]
    assert [rule["sentence"] for rule in document["explanations"]] == ["both cells with moe=b: NCCL"]
    assert document["unfinished_attempts"] == 1
    json.dumps(document)


def test_places_are_shared_where_the_measurements_cannot_tell(store):
    places = report(store).places
    at_1 = {place.cell.split("~")[0]: (place.place, place.shared) for place in places[1]}
    assert at_1 == {"moe-a_graph-off": (1, True), "moe-a_graph-on": (1, True), "moe-c_graph-off": (3, False)}
    at_8 = {place.cell.split("~")[0]: (place.place, place.shared) for place in places[8]}
    assert at_8 == {"moe-c_graph-off": (1, True), "moe-a_graph-on": (1, True), "moe-a_graph-off": (3, False)}
    assert places[1][0].tok_s.value == pytest.approx(10.175)
    assert places[1][0].tok_s.n == 4
    assert tied([10.0, 10.2, 10.1, 10.3], [10.2, 10.0, 10.1, 10.4])


def test_single_measurements_order_nothing():
    measured = [("x", rows([10.0], [1.0])), ("y", rows([90.0], [1.0]))]
    assert [(place.cell, place.place, place.shared) for place in ranking(measured, 1)] == [
        ("y", 1, True),
        ("x", 1, True),
    ]


def test_a_failed_cell_is_never_the_best(store):
    found = report(store)
    assert {n: dict(best.axes)["moe"] for n, best in found.best().items()} == {1: "a", 8: "c"}
    command = found.document()["best"]["1"]["command"]
    serve = "firebox serve firebox-tiny --port 30000 --moe-backend a --no-prefix-cache"
    assert command == f"X=1 {serve} --max-running-requests 8"


def test_profiles_have_the_names_and_types_of_settings(store):
    profiles = report(store).profiles()
    assert set(profiles) == {"concurrency-1.toml", "concurrency-8.toml"}
    assert tomllib.loads(profiles["concurrency-1.toml"]) == {
        "model": "firebox-tiny",
        "moe_backend": "a",
        "prefix_cache": False,
        "max_running_requests": 8,
    }
    assert "# set before `firebox serve --profile`: X=1" in profiles["concurrency-1.toml"]
    assert tomllib.loads(profiles["concurrency-8.toml"])["cuda_graph"] == "off"


def test_profile_of_another_server_is_its_command(tmp_path):
    text = """command = ["sglang", "serve", "--port", "{port}", "--x", '{"a": "b \\"c\\""}', "{ep}"]
    [environment]
    NCCL_DEBUG = "WARN\\ttab"
    [axes]
    ep = [1]"""
    store, planned = Store(tmp_path), cells(parse(text))
    store.plan(text, planned)
    result = Result(verdict=Verdict.STABLE, cause="", rows=rows([1.0], [2.0]))
    store.finish(store.begin((planned[0].id, 0), "m"), result)
    assert tomllib.loads(report(store).profiles()["concurrency-1.toml"]) == {
        "command": ["sglang", "serve", "--port", "30000", "--x", '{"a": "b \\"c\\""}', "1"],
        "environment": {"NCCL_DEBUG": "WARN\ttab"},
    }


def test_heat_maps_show_speeds_verdicts_and_what_was_skipped(store):
    maps = list(heat_maps(report(store)))
    assert [title for title, *_ in maps] == ["Tokens/s at concurrency 1", "Tokens/s at concurrency 8"]
    _, columns, table = maps[1]
    assert columns == ("moe", "graph=off", "graph=on")
    assert table == [("a", "50.1", "70.2"), ("b", "NCCL", "NCCL"), ("c", "70.3", "skipped")]


class Page(HTMLParser):
    """What stands in a page, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing(store):
    text = html(report(store))
    page = Page()
    page.feed(text)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    assert not any("src" in attributes for _, attributes in page.tags)
    assert "url(" not in text and "@import" not in text
    assert "speeds &lt;of&gt; moe" in text and "two &lt;b&gt;" in text
    assert "both cells with moe=b: NCCL" in text
    assert len(re.findall(r'class="heat"', text)) == 6


def test_markdown(store):
    text = markdown(report(store))
    assert "5 cells: 3 STABLE, 2 NCCL." in text
    assert "- both cells with moe=b: NCCL: links. Remedy: plug them." in text
    assert "| a | 50.1 | 70.2 |" in text
    assert re.search(r"\| =1 \| 70\.3 ± 0\.\d \| moe-", text)


def test_matrix_report_on_the_command_line(store, tmp_path):
    store.close()
    page = tmp_path / "r.html"
    done = CliRunner().invoke(build(), ["matrix", "report", str(tmp_path), "--json", "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["cells"]) == 5
    seen = open_page(page, tmp_path / "r.png", "table", wait_for="table")
    assert seen.problems == [] and seen.requests == [] and seen.counts["table"] >= 4
    assert "speeds <of> moe" in seen.title + seen.text and (tmp_path / "r.png").stat().st_size > 10_000
    done = CliRunner().invoke(build(), ["matrix", "report", str(tmp_path / "matrix.sqlite")])
    assert done.stdout.startswith("# speeds <of> moe")


def test_a_grid_that_has_not_run_yet_has_a_report(tmp_path):
    store = Store(tmp_path)
    store.plan(TEXT, cells(parse(TEXT)))
    found = report(store)
    assert found.counts() == [("not run", 5)]
    assert found.best() == {} and found.profiles() == {}
    assert "not run" in markdown(found) and "not run" in html(found)
