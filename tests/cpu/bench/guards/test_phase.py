"""The guards of a whole phase: each finds its failure, and passes the good case that comes nearest."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from firebox.bench.base import Answer, Finding, Piece
from firebox.bench.guards.base import Reference
from firebox.bench.guards.reference import load as load_references
from firebox.bench.watch import judge
from firebox.errors import ConfigError
from tests.support.bench_streams import answer, kind

TEXTS = [r.text[:700] for r in kind("good") if r.source.startswith("Python")][:12]
NAMES = (
    "rivers",
    "bread",
    "prime numbers",
    "the moon",
    "sorting",
    "chess",
    "glass",
    "rain",
    "trains",
    "maps",
)


def _ask(number: int) -> str:
    return f"Tell me about {NAMES[number]}."


def _said(number: int, text: str, **fields: object) -> Answer:
    return answer(number, str(fields.pop("prompt", _ask(number))), [Piece(0.0, text)], **fields)


def _named(found: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.guard, finding.verdict) for finding in found}


def test_good_answers_pass() -> None:
    assert judge([_said(n, TEXTS[n], output_tokens=150 + 7 * n) for n in range(8)]) == []
    assert judge([]) == []


@pytest.mark.parametrize(
    "change", [lambda n, t: t, lambda n, t: t[: 500 + 20 * n], lambda n, t: f"{t} {NAMES[n]}."]
)
def test_one_text_for_all_prompts_is_garbage(change: object) -> None:
    found = judge([_said(n, change(n, TEXTS[0])) for n in range(8)])  # type: ignore[operator]
    assert _named(found) == {("same_text", "garbage")}
    assert found[0].answers == tuple(range(8))


def test_two_alike_among_many_are_suspicious() -> None:
    texts = [TEXTS[n] for n in range(8)]
    texts[5] = texts[2].upper()
    found = judge([_said(n, text) for n, text in enumerate(texts)])
    assert _named(found) == {("same_text", "suspicious")} and found[0].answers == (2, 5)


def test_the_same_prompt_may_have_the_same_answer() -> None:
    assert judge([_said(n, TEXTS[0], prompt="What is rain?") for n in range(6)]) == []
    assert judge([_said(n, TEXTS[0], prompt=f"[run {n}f3] What is rain?") for n in range(6)]) == []
    assert judge([_said(n, "Yes.") for n in range(6)]) == []


def test_same_lengths_are_suspicious_only_where_they_were_free() -> None:
    same = [_said(n, TEXTS[n], output_tokens=137) for n in range(6)]
    assert _named(judge(same)) == {("same_rates", "suspicious")}
    assert judge([_said(n, TEXTS[n], output_tokens=137, open_ended=False) for n in range(6)]) == []
    assert judge([_said(n, TEXTS[n], output_tokens=3) for n in range(6)]) == []
    assert judge([_said(n, TEXTS[n], output_tokens=137 + n % 3) for n in range(6)]) == []


@pytest.mark.parametrize(("jitter", "suspicious"), [(0.0, True), (1e-8, True), (1e-4, False)])
def test_rates_equal_to_a_millionth_are_suspicious(jitter: float, suspicious: bool) -> None:
    answers = []
    for n in range(6):
        tokens = 100 + 13 * n
        pieces = [Piece(1.0, TEXTS[n][:300]), Piece(1.0 + tokens / 50 * (1 + jitter * n), TEXTS[n][300:])]
        answers.append(answer(n, _ask(n), pieces, output_tokens=tokens))
    assert (_named(judge(answers)) == {("same_rates", "suspicious")}) == suspicious


def test_all_stopping_for_length_is_suspicious_where_the_end_was_free() -> None:
    cut = [_said(n, TEXTS[n], finish_reason="length") for n in range(6)]
    assert _named(judge(cut)) == {("all_length", "suspicious")}
    assert judge([*cut[:5], _said(5, TEXTS[5])]) == []
    assert judge([_said(n, TEXTS[n], finish_reason="length", open_ended=False) for n in range(6)]) == []


def test_no_content_tells_thinking_from_nothing() -> None:
    nothing = [answer(n, _ask(n), [Piece(0.0, "<|endoftext|>")], output_tokens=99) for n in range(3)]
    found = judge(nothing)
    assert _named(found) == {("no_content", "garbage")} and "297 tokens" in found[0].why
    thought = [answer(n, _ask(n), [Piece(0.0, TEXTS[n], reasoning=True)]) for n in range(3)]
    assert _named(judge(thought)) == {("no_content", "empty")}
    assert judge([answer(n, _ask(n), error="timed out") for n in range(3)]) == []
    mostly = [answer(n, f"{_ask(n % 10)} {'x' * n}", [Piece(0.0, f"Short {n}.")]) for n in range(99)]
    assert judge([*mostly, answer(99, "what")]) == []


def test_answers_about_something_else_fail_against_their_references() -> None:
    references = {_ask(n): Reference(_ask(n), TEXTS[n]) for n in range(8)}
    halves = [TEXTS[n][:350] + " ".join(reversed(TEXTS[n][350:].split())) for n in range(8)]
    assert judge([_said(n, halves[n]) for n in range(8)], references) == []
    shifted = judge([_said(n, TEXTS[(n + 1) % 8]) for n in range(8)], references)
    assert _named(shifted) == {("reference", "garbage")}


def test_references_that_match_no_prompt_are_not_passed_over() -> None:
    found = judge([_said(0, TEXTS[0])], {"another": Reference("another", "one")})
    assert _named(found) == {("reference", "suspicious")}


@pytest.mark.parametrize(
    ("logprob", "verdict"), [(-0.3, None), (-9.0, "garbage"), (math.nan, "garbage"), (2.0, "garbage")]
)
def test_perplexity_of_flat_or_broken_logits_is_garbage(logprob: float, verdict: str | None) -> None:
    pieces = [Piece(0.0, TEXTS[0], logprobs=(logprob, -0.1, logprob))]
    found = judge([answer(0, _ask(0), pieces)])
    assert _named(found) == ({("reference", verdict)} if verdict else set())


def test_perplexity_far_above_the_references_is_suspicious() -> None:
    references = {_ask(0): Reference(_ask(0), TEXTS[0], perplexity=1.5)}
    pieces = [Piece(0.0, TEXTS[0], logprobs=(-2.0,))]
    assert _named(judge([answer(0, _ask(0), pieces)], references)) == {("reference", "suspicious")}


def test_a_reference_file_is_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "references.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n")
    assert load_references(file) == {"a": Reference("a", "b")}
    for text, said in (('{"prompt": 3}\n', ":1 is no reference"), ("", "holds no reference")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            load_references(file)
    with pytest.raises(ConfigError, match="no reference file"):
        load_references(tmp_path / "absent")
