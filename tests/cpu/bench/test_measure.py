"""The whole measurement against a simulated server: what it finds out, what it condemns, what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from firebox.bench.base import Answer, Ask, Finding, Phase, Piece, Session
from firebox.bench.drive import Run
from firebox.bench.guards.base import Reference
from firebox.bench.laws import violations
from firebox.bench.measure import Settings, claim_of, measure
from firebox.bench.report.base import Report
from firebox.bench.roofline import roofline
from firebox.bench.row import Row, mark_ties, summarise
from firebox.cli import main as cli
from firebox.cli._fit_model import source_of
from firebox.errors import ConfigError
from firebox.hardware.base import find_gpu
from tests.support.simulated_server import Behaviour, simulated

FAST = {"first_token_s": 0.05, "token_s": 0.002, "tokenizes": True}
SMALL = {"concurrency": (1, 2), "prompt_tokens": (10,), "output_tokens": (40,), "requests": 1, "repeat": 2}


def report(behaviour: dict[str, Any], **settings: Any) -> Report:
    with simulated(Behaviour(**{**FAST, **behaviour})) as url:
        return measure(Settings(url=url, choices=SMALL, seed=5, **settings))


@pytest.mark.alone  # 5 % of 128 ms
def test_rows_of_a_sound_server_have_numbers() -> None:
    found = report({"ids": True})
    assert found.passed and found.model == "simulated" and found.notes == []
    assert [(row.concurrency, row.requests, row.repetitions) for row in found.rows] == [(1, 2, 2), (2, 4, 2)]
    for row in found.rows:
        assert row.prompt_tokens == 10 and row.output_tokens == 40 and row.tokens_counted_by == "usage"
        wall = row.concurrency * 40 / (0.05 + 39 * 0.002)
        assert row.output_tok_s_wall == pytest.approx(wall, rel=0.05)
        low, high = row.intervals["output_tok_s_wall"]
        assert low < row.output_tok_s_wall < high and len(row.samples["output_tok_s_wall"]) == 2


def test_refused_fields_are_left_out_and_named() -> None:
    found = report({"refuses": ("return_token_ids", "ignore_eos")})
    assert found.passed
    assert found.notes == ["the server refuses return_token_ids", "the server refuses ignore_eos"]


def test_without_a_tokenizer_lengths_are_estimates_and_it_says_so() -> None:
    found = report({"tokenizes": False})
    assert found.passed and "no tokenizer: prompt lengths are estimates" in found.notes[0]
    assert all(row.prompt_tokens == pytest.approx(10, abs=4) for row in found.rows)


def test_the_tokenizer_counts_where_the_server_does_not() -> None:
    found = report({"usage": False})
    assert found.passed and {row.tokens_counted_by for row in found.rows} == {"tokenizer"}
    assert found.rows[0].output_tokens == 40


@pytest.mark.parametrize(
    ("behaviour", "verdict", "says"),
    [
        ({"text": "!"}, "garbage", "one_token"),
        ({"ids": True, "claims": 1.5}, "impossible", "usage says 60 tokens, 40 ids were sent"),
        ({"metered": 0.5}, "impossible", "server_metrics"),
        ({"abort_after": 10}, "failed", "the connection was cut in mid-stream"),
        ({"status": 503}, None, "HTTP 503"),
    ],
)
def test_rows_that_cannot_be_believed_have_a_verdict(
    behaviour: dict[str, Any], verdict: str | None, says: str
) -> None:
    if verdict is None:  # not even the first request is answered
        with pytest.raises(ConfigError, match=says):
            report(behaviour)
        return
    found = report(behaviour)
    assert not found.passed
    for row in found.rows:
        assert (row.verdict, row.output_tok_s_wall, row.ttft_ms) == (verdict, None, None)
        assert any(says in why for why in row.why), row.why


def test_faster_than_memory_allows_is_impossible() -> None:
    roof = roofline(source_of("glm-4.7-fp8", "auto"), find_gpu("gb10"), 1)
    found = report({}, roof=roof)
    assert [row.verdict for row in found.rows] == ["impossible"] * 2
    assert all(any(why.startswith("roofline: ") for why in row.why) for row in found.rows), found.rows
    roof = roofline(source_of("firebox-tiny", "auto"), find_gpu("h200"), 1)
    for row in report({}, roof=roof).rows:
        assert row.verdict == "ok" and 0 < row.roof_share < 0.1, row.why


def test_answers_are_held_against_references() -> None:
    prompts = {f"What is {n}?": Reference(f"What is {n}?", f"It is the number {n}.") for n in range(4)}
    found = report({}, references=prompts)
    assert [row.workload for row in found.rows] == ["quick", "quick", "reference"]
    assert [row.verdict for row in found.rows] == ["ok", "ok", "garbage"]
    reasons = found.rows[2].why  # a word that the server draws may be one of a reference's
    assert any(re.search(r"share \d{1,2}% of their words", why) for why in reasons), reasons


def test_flat_logits_are_found_by_their_perplexity() -> None:
    prompts = {f"What is {n}?": Reference(f"What is {n}?", "It is.") for n in range(2)}
    found = report({"logprob": -8.0}, references=prompts).rows[2]
    assert any("perplexity" in why for why in found.why), found.why
    found = report({"logprob": -0.5}, references=prompts).rows[2]
    assert not any("perplexity" in why for why in found.why)


def test_the_servers_counters_tell_how_many_drafts_were_accepted() -> None:
    assert [row.accept_length for row in report({"burst": 4}).rows] == [4.0, 4.0]
    assert [row.accept_length for row in report({}).rows] == [None, None]


def test_rows_that_the_intervals_do_not_tell_from_the_best_are_ties() -> None:
    def row(concurrency: int, *walls: float, length: int = 1) -> Row:
        wall = sum(walls) / len(walls)
        common = dict(workload="w", requests=1, failed=0, repetitions=len(walls), verdict="ok")
        samples = {"output_tok_s_wall": list(walls)}
        axes = {"prompt_tokens": length}
        return Row(concurrency=concurrency, axes=axes, output_tok_s_wall=wall, samples=samples, **common)

    rows = [row(1, 50, 51, 52), row(2, 98, 100, 103), row(4, 99, 101, 102), row(8, 100.0, 100.1, length=2)]
    mark_ties(rows)
    assert [row.tied for row in rows] == [False, True, True, False]


def test_no_server_and_no_such_model() -> None:
    with pytest.raises(ConfigError, match="does not answer as an OpenAI-compatible server"):
        measure(Settings(url="http://127.0.0.1:9"))
    with pytest.raises(ConfigError, match="serves no model 'other'; it serves simulated"):
        report({}, model="other")


def command(url: str, tmp_path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    lengths = ["--concurrency", "2", "--prompt-tokens", "5", "--output-tokens", "20", "--requests", "1"]
    kept = ["--db", str(tmp_path / "results.db"), "--json"]
    done = CliRunner().invoke(cli.build(), ["bench", url, *lengths, "--repeat", "2", *kept, *more])
    return done.exit_code, json.loads(done.stdout.splitlines()[-1])


def test_the_command_prints_the_contract_and_keeps_reports(tmp_path: Path) -> None:
    with simulated(Behaviour(**FAST)) as url:
        status, found = command(url, tmp_path, "--name", "first", "--slo", "ttft=500,tpot=0.1")
        again, _ = command(url, tmp_path, "--name", "second", "--html", str(tmp_path / "page.html"))
    assert (status, again) == (0, 0)
    [row] = found["rows"]
    fixed = {"concurrency", "requests", "failed", "verdict", "tokens_counted_by"}
    assert fixed | {"output_tok_s_wall", "output_tok_s_sum", "ttft_ms", "tpot_ms"} <= set(row)
    assert {"p50", "p90", "p99"} <= set(row["ttft_ms"]) and {"p50", "p90", "p99"} <= set(row["tpot_ms"])
    assert row["goodput"] == {"share": 0.0, "requests_per_s": 0.0}
    assert (tmp_path / "page.html").stat().st_size > 1_000_000
    compared = CliRunner().invoke(
        cli.build(), ["bench", "compare", "first", "second", "--db", str(tmp_path / "results.db"), "--json"]
    )
    pairs = json.loads(compared.stdout)["pairs"]
    assert [pair["measure"] for pair in pairs] == ["output_tok_s_wall", "ttft_ms", "tpot_ms"]
    assert abs(pairs[0]["change"]["value"]) < 0.1


def test_the_command_fails_for_garbage(tmp_path: Path) -> None:
    with simulated(Behaviour(**FAST, text="+")) as url:
        status, found = command(url, tmp_path)
    assert status == 1 and not found["passed"] and found["rows"][0]["verdict"] == "garbage"


@pytest.mark.parametrize(
    "flags",
    [
        ["--concurrency", "one"],
        ["--concurrency", "1,0"],
        ["--rates", "0"],
        ["--slo", "fast"],
        ["--extra", "[1]"],
        ["--card", "glm-4.7-fp8"],
        ["--profile", "none"],
    ],
)
def test_wrong_flags_are_refused(flags: list[str]) -> None:
    with simulated(Behaviour(**FAST)) as url:
        done = CliRunner().invoke(cli.build(), ["bench", url, *flags])
    assert isinstance(done.exception, ConfigError), done.output


def test_one_flagged_answer_of_many_is_noted_and_two_in_a_hundred_condemn() -> None:
    phase = Phase(workload="w", concurrency=1, sessions=())
    ask = Ask(max_tokens=2, prompt="x")

    def run(first_s: float) -> Run:
        answers = [
            Answer(ask=ask, number=n, due_s=first_s, sent_s=first_s, ended_s=first_s + 1, output_tokens=2)
            for n in range(60)
        ]
        for answer in answers:
            answer.pieces = [Piece(first_s + 0.5, "a"), Piece(first_s + 1, "b")]
        return Run(phase=phase, answers=answers, began_s=first_s, ended_s=first_s + 1, steady_s=first_s + 1)

    def flagged(*numbers: int) -> list[Finding]:
        return [Finding(guard="g", verdict="garbage", why="w", answers=(n,)) for n in numbers]

    runs = [run(0.0), run(2.0)]
    noted = summarise(runs, [flagged(7), flagged(7)])
    assert noted.verdict == "ok" and noted.notes == ["2 of 120 answers were flagged: g: w"]
    assert summarise(runs, [flagged(7), flagged(7, 8)]).verdict == "garbage"
    of_all = Finding(guard="same_text", verdict="garbage", why="w")
    assert summarise(runs, [[of_all], []]).verdict == "garbage"


def test_a_server_that_gathers_its_first_tokens_breaks_no_law() -> None:
    """40 tokens at once and 56 one by one: the wall rate is above the sum of decode rates, and may be."""
    ask = Ask(max_tokens=96, prompt="x")
    answer = Answer(ask=ask, number=0, due_s=0.0, sent_s=0.0, ended_s=0.052, output_tokens=96)
    ids = [tuple(range(40)), *([(1,)] * 56)]
    answer.pieces = [Piece(0.012 + 0.04 * n / 56, "a", False, ids[n]) for n in range(57)]
    phase = Phase(workload="w", concurrency=1, sessions=(Session(asks=(ask,)),))
    run = Run(phase=phase, answers=[answer], began_s=0.0, ended_s=0.052, steady_s=0.052)
    claim = claim_of(run, {})
    assert summarise([run]).tokens_in_first_event == 40
    assert claim is not None and claim.output_tok_s > 1.15 * summarise([run]).output_tok_s_sum
    assert violations(claim) == ()
