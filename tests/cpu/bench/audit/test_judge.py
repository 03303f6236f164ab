"""Whole tables, in the formats of the tools and with the mistakes of the field, and their verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from firebox.bench.audit.judge import Verdict, judge
from firebox.bench.audit.rows import read_rows
from firebox.bench.audit.table import read
from firebox.bench.roofline import Roofline
from firebox.hardware.base import find_gpu
from tests.support.planning import opened

TABLES = Path(__file__).parent / "tables"


def verdicts(text: str, roof: Roofline | None = None, **defaults: float) -> tuple[Verdict, ...]:
    return judge(read_rows(read(text), {}, defaults).rows, roof)


def of(name: str, roof: Roofline | None = None) -> tuple[Verdict, ...]:
    return verdicts((TABLES / name).read_text(encoding="utf-8"), roof)


def short(found: tuple[Verdict, ...]) -> list[tuple[int, str, str | None]]:
    return [(v.row.number, v.verdict, v.laws[0].law if v.laws else None) for v in found]


def test_garbage_rows_of_a_matrix() -> None:
    """Of Qwen3.5-397B-A17B-NVFP4 on 4 × GB10: 143 to 156 tok/s at concurrency 8 were one repeated token."""
    found = of("qwen-matrix.md", Roofline(opened("qwen3.5-397b-a17b-nvfp4"), find_gpu("gb10"), 4, True))
    at_8 = {v.row.number: v for v in found if v.row.claim.in_flight == 8}
    assert {n: v.verdict for n, v in at_8.items()} == {
        1: "possible", 2: "suspicious", 3: "possible", 4: "suspicious", 5: "possible", 6: "suspicious",
    }  # fmt: skip
    assert all(v.laws[0].law == "garbage_fingerprint" for v in at_8.values() if v.laws)
    assert at_8[1].roof_fraction == pytest.approx(0.586, abs=0.003)
    assert at_8[2].roof_fraction == pytest.approx(0.897, abs=0.003)
    others = [v for v in found if v.row.claim.in_flight != 8]
    assert len(others) == 10 and {v.verdict for v in others} == {"possible"}  # one cell is OOM, one is empty


def test_without_a_card_nothing_is_known_of_them() -> None:
    assert {v.verdict for v in of("qwen-matrix.md")} == {"unknown"}


def test_littles_law_broken_by_two_to_three() -> None:
    found = of("little.md")
    assert short(found) == [
        (1, "possible", None),
        (2, "impossible", "littles_law"),
        (3, "impossible", "littles_law"),
        (4, "possible", None),
        (5, "unknown", None),
    ]
    broken = found[1].document()
    assert broken["claimed"] == 395.2
    assert broken["implied"] == pytest.approx(8 * 512 / 25.95)
    assert broken["factor"] == pytest.approx(395.2 / (8 * 512 / 25.95))
    assert found[4].row.unread == ("output tok/s", "TTFT (ms)", "TPOT (ms)")


def test_vllm_reports_a_peak_below_its_mean() -> None:
    (row,) = of("vllm-serve.json")
    claim = row.row.claim
    assert (claim.requests, claim.concurrency_limit, claim.e2e_ms.p50, claim.tpot_ms.p99) == (
        80,
        8,
        41_600,
        166,
    )
    assert [law.law for law in row.laws] == ["peak_below_mean"]


def test_sglang_twice_the_tokens() -> None:
    good, bad = of("sglang-serving.jsonl")
    assert (good.verdict, bad.verdict) == ("possible", "impossible")
    assert {"littles_law", "total_is_sum", "tokens_by_latency"} <= {law.law for law in bad.laws}
    assert bad.laws[0].factor == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("name", ["llama-benchy.md", "llama-benchy.json"])
def test_a_prompt_rate_that_the_wait_contradicts(name: str) -> None:
    """16,384 tokens of context, 6,155 ms to the first token: 2,662 tok/s, and not 770,513."""
    (bad,) = [v for v in of(name) if v.row.claim.prefill_tok_s == 770_513]
    assert (bad.verdict, bad.laws[0].law) == ("impossible", "prefill_by_ttft")
    assert bad.laws[0].implied == pytest.approx(2662, abs=0.5)
    assert bad.laws[0].factor == pytest.approx(289.5, abs=0.1)


def test_llama_benchys_tests() -> None:
    found = of("llama-benchy.md")
    assert [v.row.number for v in found if v.verdict == "impossible"] == [3, 4, 6]
    assert [v.row.number for v in found if v.verdict == "possible"] == [1, 2, 5]
    assert [law.law for law in found[3].laws] == ["peak_below_mean"]
    assert [law.law for law in found[5].laws] == ["tokens_by_latency", "monotony"]
    assert found[4].row.claim.in_flight == 4 and found[4].row.half_width["decode_tok_s"] == 0.4


def test_llama_bench_against_the_roofs() -> None:
    """gpt-oss-120b on one GB10: 54.6 tok/s is the roof of one request with the card's weights, of which 52.9
    are 97 %. (A GGUF of it has fewer bytes; the command says that it judges the card's.)"""
    roof = Roofline(opened("gpt-oss-120b"), find_gpu("gb10"), 1, True)
    assert [v.verdict for v in of("llama-bench.csv")] == ["unknown"] * 3
    prompts, *output = of("llama-bench.csv", roof)
    assert prompts.verdict == "possible"
    assert [v.verdict for v in output] == ["suspicious"] * 2


def test_genai_perf_is_one_row() -> None:
    (row,) = of("genai-perf.csv")
    claim = row.row.claim
    assert (claim.output_tok_s, claim.output_tokens, claim.e2e_ms.mean) == (443.2, 200, 4451.3)
    assert row.verdict == "possible"
    (at_8,) = verdicts((TABLES / "genai-perf.csv").read_text(), concurrency=8)
    assert at_8.laws[0].law == "littles_law"  # 2.21 requests/s × 4.45 s are 9.8


def test_our_own_benchmark() -> None:
    assert short(of("firebox-bench.json")) == [(1, "possible", None), (2, "impossible", "wall_above_sum")]


def test_ties() -> None:
    assert [v.verdict for v in of("ties.csv")] == ["tie", "tie", "possible", "possible"]


def test_an_impossible_row_is_no_rival() -> None:
    text = "cfg,concurrency,tok/s,tpot\na,8,950 ± 9,80\nb,8,95 ± 1,80\nc,8,94.5 ± 1,80\nd,8,90 ± 1,80\n"
    assert [v.verdict for v in verdicts(text)] == ["impossible", "tie", "tie", "possible"]


def test_identical_rates_of_different_configurations() -> None:
    text = "cfg,concurrency,tok/s,tpot\na,8,95.213,80\nb,8,95.213,80\nc,8,95.2,80\nd,8,95.2,80\n"
    assert short(verdicts(text)) == [
        (1, "suspicious", "identical_rows"),
        (2, "suspicious", "identical_rows"),
        (3, "possible", None),
        (4, "possible", None),
    ]


def test_one_configuration_may_be_listed_twice() -> None:
    text = "cfg,concurrency,tok/s,tpot\na,8,95.213,80\na,8,95.213,80\n"
    assert [v.verdict for v in verdicts(text)] == ["possible", "possible"]


def test_a_default_holds_only_where_a_row_does_not_say() -> None:
    text = "concurrency,tok/s,tpot\n8,95,80\n,95,80\n"
    assert [v.verdict for v in verdicts(text, concurrency=2)] == ["possible", "impossible"]


def test_far_above_the_neighbours_and_near_the_roof() -> None:
    """125 tok/s is 72 % of the roof: not a fingerprint by itself, but neighbours have 85."""
    roof = Roofline(opened("qwen3.5-397b-a17b-nvfp4"), find_gpu("gb10"), 4, True)
    lone = "cfg,concurrency,tok/s\na,8,125\n"
    assert short(verdicts(lone, roof)) == [(1, "possible", None)]
    among = lone + "b,8,85\nc,8,84\nd,8,86\n"
    assert [v.verdict for v in verdicts(among, roof)] == ["suspicious", *3 * ["possible"]]
    assert verdicts(among, roof)[0].laws[0].law == "above_neighbours"


def test_rising_with_company() -> None:
    text = "cfg,c,tok/s\na,1,20\na,8,240\nb,1,30\nb,8,200\n"
    assert short(verdicts(text)) == [
        (1, "unknown", None), (2, "suspicious", "monotony"), (3, "unknown", None), (4, "unknown", None),
    ]  # fmt: skip


def test_rows_are_numbered_over_all_tables() -> None:
    text = "| c | tok/s |\n|--|--|\n| 1 | 2 |\n| x | y |\n\n| c | tok/s |\n|--|--|\n| 4 | 5 |\n"
    assert [v.row.number for v in verdicts(text)] == [1, 3]
