"""Headings of real tools and of people, into fields and units."""

from __future__ import annotations

import pytest

from firebox.bench.audit.columns import AMBIGUOUS, FIELDS, NAMES, Column, column, columns, is_label, scale
from firebox.errors import ConfigError

MEANT = {
    # vLLM
    "Request throughput (req/s)": "requests_per_s",
    "Output token throughput (tok/s)": "output_tok_s",
    "Peak output token throughput (tok/s)": "peak_tok_s",
    "Total Token throughput (tok/s)": "total_tok_s",
    "output_throughput": "output_tok_s",
    "max_output_tokens_per_s": "peak_tok_s",
    "total_output_tokens": "total_output_tokens",
    "Total generated tokens": "total_output_tokens",
    "max_concurrency": "concurrency_limit",
    "completed": "requests",
    "mean_ttft_ms": "ttft_ms.mean",
    "median_tpot_ms": "tpot_ms.p50",
    "p99_itl_ms": "itl_ms.p99",
    "mean_e2el_ms": "e2e_ms.mean",
    "Benchmark duration (s)": "duration_s",
    # SGLang
    "input_throughput": "input_tok_s",
    "mean_e2e_latency_ms": "e2e_ms.mean",
    "Median E2E Latency (ms)": "e2e_ms.p50",
    "concurrency": "concurrency",
    "random_output_len": "output_tokens",
    "accept_length": "accept_length",
    # llama-benchy's JSON, our own
    "pp_throughput": "prefill_tok_s",
    "tg_throughput": "decode_tok_s",
    "tg_req_throughput": "request_tok_s",
    "e2e_ttft": "ttft_ms.mean",
    "context_size": "depth_tokens",
    "output_tok_s_wall": "output_tok_s",
    "output_tok_s_sum": "output_tok_s_sum",
    "ttft_ms.p90": "ttft_ms.p90",
    # genai-perf, guidellm
    "Time To First Token (ms) avg": "ttft_ms.mean",
    "Output Token Throughput (per sec)": "output_tok_s",
    "Output Sequence Length (tokens) avg": "output_tokens",
    "metrics.output_tokens_per_second.successful.mean": "output_tok_s",
    "metrics.time_to_first_token_ms.successful.percentiles.p99": "ttft_ms.p99",
    "metrics.request_concurrency.successful.mean": "concurrency",
    # people
    "tok/s": "output_tok_s",
    "t/s": "output_tok_s",
    "Throughput (tokens/s)": "output_tok_s",
    "Output TPS": "output_tok_s",
    "decode tok/s": "decode_tok_s",
    "Prefill (t/s)": "prefill_tok_s",
    "tok/s per user": "request_tok_s",
    "TTFT": "ttft_ms.mean",
    "TTFT p99 (s)": "ttft_ms.p99",
    "Users": "concurrency",
    "prompt tok/s": "input_tok_s",
    "ISL": "input_tokens",
    # nothing of a benchmark
    "backend": None,
    "std_ttft_ms": None,
    "request_goodput": None,
    "GPU util %": None,
    "load time (s)": None,
    "prefill (ms)": None,
    "ttfr": None,
}


@pytest.mark.parametrize(("header", "field"), MEANT.items())
def test_meaning(header: str, field: str | None) -> None:
    found = column(header)
    assert (found and found.field) == field


def test_wide_headings() -> None:
    assert column("n=8 tok/s") == Column("output_tok_s", "tok_s", 8)
    assert column("n=4 peak") == Column("output_tok_s_sum", "", 4)
    assert column("decode N=32 tok/s") == Column("decode_tok_s", "tok_s", 32)
    assert column("TTFT (ms) @ c16") == Column("ttft_ms.mean", "ms", 16)
    assert column("n=4 outcome") is None


@pytest.mark.parametrize("header", ["latency (ms)", "n", "Total tok/s", "speed", "Time (s)", "tokens"])
def test_what_may_mean_several_things_is_refused_with_the_choices(header: str) -> None:
    with pytest.raises(ConfigError, match="may be") as refused:
        columns((header,), {})
    choice = AMBIGUOUS[header.split()[0].lower()][0]
    assert choice in str(refused.value) and f"={choice}" in (refused.value.hint or "")
    settled = columns((header,), {header: choice})[header]
    assert settled is not None and settled.field.startswith(choice)
    assert columns((header,), {header: "ignore"}) == {header: None}


def test_two_headings_of_one_meaning() -> None:
    with pytest.raises(ConfigError, match="'tok/s' and 'throughput' both read as output_tok_s"):
        columns(("tok/s", "throughput"), {})
    found = columns(("num_prompts", "completed", "median tok/s", "mean tok/s"), {})
    assert {h: c and c.field for h, c in found.items()} == {
        "num_prompts": None,
        "completed": "requests",
        "median tok/s": None,
        "mean tok/s": "output_tok_s",
    }


def test_an_override_that_is_no_field() -> None:
    with pytest.raises(ConfigError, match="no such field") as refused:
        columns(("x",), {"x": "tokens_per_s"})
    assert "output_tok_s" in (refused.value.hint or "")
    assert columns(("lat (s)",), {"lat (s)": "e2e_ms.p50"})["lat (s)"] == Column("e2e_ms.p50", "s")


@pytest.mark.parametrize(
    ("header", "unit", "factor"),
    [
        ("ttft_ms", "", 1),
        ("TTFT (s)", "", 1000),
        ("TTFT", "s", 1000),
        ("TTFT (s)", "ms", 1),
        ("ITL (µs)", "", 0.001),
        ("duration (s)", "", 1),
        ("duration", "", 1),
        ("duration", "ms", 0.001),
        ("tok/s", "tok/s", 1),
    ],
)
def test_units(header: str, unit: str, factor: float) -> None:
    found = column(header)
    assert found is not None and scale(found, unit) == pytest.approx(factor)


def test_labels() -> None:
    assert is_label("MoE backend") and is_label("ep_size")
    assert not is_label("std_ttft_ms") and not is_label("prefill (ms)") and not is_label("failed")


def test_the_table_of_names_is_sound() -> None:
    assert set(NAMES.values()) <= set(FIELDS)
    assert all(set(choices) <= set(FIELDS) for choices in AMBIGUOUS.values())
    assert not [name for name in AMBIGUOUS if name in NAMES]
