"""When the experts that were looked at void a row: on numbers made by drawing, on a CPU with what a GPU would
have seen put in its place, and on the command line."""

from __future__ import annotations

import json
import random
import statistics
from typing import Any

import pytest
from typer.testing import CliRunner

from firebox.bench import offline
from firebox.bench._routing import Routing, void
from firebox.cli import main as cli
from firebox.hardware.base import find_gpu
from firebox.kernels.plan import Setting
from firebox.layers.launches import layers_of
from tests.support.planning import opened

GPT_OSS, QWEN, KIMI = Routing(128, 4), Routing(128, 8), Routing(384, 8)
TINY = Routing(16, 4)  # firebox-tiny, whose fused shared expert is a seventeenth to the kernels


def drawn(routing: Routing, tokens: int, looks: int, seed: int) -> list[int]:
    """What uniform routing gives in so many layers and steps."""
    choice = random.Random(seed)
    everyone = range(routing.experts)
    return [
        len(set().union(*(choice.sample(everyone, routing.top_k) for _ in range(tokens))))
        for _ in range(looks)
    ]


@pytest.mark.parametrize("routing", [GPT_OSS, KIMI, TINY])
@pytest.mark.parametrize("tokens", [1, 2, 8, 64])
def test_expected_number_and_deviation_are_those_of_drawing(routing: Routing, tokens: int) -> None:
    found = drawn(routing, tokens, 3000, seed=tokens)
    assert statistics.mean(found) == pytest.approx(routing.expected(tokens), rel=0.01)
    assert statistics.pstdev(found) == pytest.approx(routing.deviation(tokens), rel=0.1, abs=0.02)


@pytest.mark.parametrize("routing", [GPT_OSS, QWEN, TINY])
@pytest.mark.parametrize("looks", [1, 2, 94])
def test_spread_routing_is_not_void(routing: Routing, looks: int) -> None:
    """However few layers were looked at."""
    for seed in range(40):
        for tokens in (1, 2, 5, 8, 64, 256):
            assert void(routing, tokens, drawn(routing, tokens, looks, seed)) is None


@pytest.mark.parametrize("tokens", [4, 8, 64, 256])
def test_tokens_that_go_one_way_are_void(tokens: int) -> None:
    for routing in (GPT_OSS, QWEN, KIMI):
        assert void(routing, tokens, [routing.top_k] * 2) is not None


def test_a_single_token_meets_exactly_its_choices() -> None:
    assert void(QWEN, 1, [8]) is None
    assert void(QWEN, 1, [9]) is not None, "a shared expert that was counted too"
    assert void(Routing(1, 1), 5, [1]) is None


def test_recorded_rows() -> None:
    """docs/log/2026-11-22-whole-steps.md and -passes-side-by-side.md: Kimi-K2.5 in 7 sparse layers before and
    after its fill was mended, gpt-oss in 36."""
    assert void(KIMI, 8, [27] * 14) is not None and void(KIMI, 64, [86] * 14) is not None
    assert void(KIMI, 8, [59] * 14) is None and void(KIMI, 64, [282] * 14) is None
    assert void(GPT_OSS, 64, [110] * 72) is None
    assert void(GPT_OSS, 8, [27] * 2) is None


def test_the_tolerance_follows_from_the_number_of_looks() -> None:
    """24 distinct experts where 28.7 are expected: chance in one layer and step, not in 36 layers."""
    assert void(GPT_OSS, 8, [24]) is None
    why = void(GPT_OSS, 8, [24] * 72)
    assert why is not None and "24.0 distinct experts in 72" in why and "28.7 ± 2.2" in why
    assert void(GPT_OSS, 8, [34]) is None
    assert void(GPT_OSS, 8, [34] * 72) is not None, "too many are as impossible"


@pytest.mark.parametrize(
    "card", ["glm-4.5-air-fp8", "qwen3.5-397b-a17b-nvfp4", "gpt-oss-120b", "kimi-k2.5-int4"]
)
def test_the_kernels_problem_without_shared_experts_is_the_model_s(card: str) -> None:
    """experts_looked_at reads the one, the expected number the other."""
    found = opened(card)
    routing = offline._routing(found.parts)
    layers = layers_of(found.model, Setting(find_gpu("h200"), page_tokens=64))
    problems = [op.problem for layer in layers for op in layer.operations if op.name == "experts"]
    assert problems and {(p.experts - p.shared, p.top_k - p.shared) for p in problems} == {routing}
    if card.startswith("glm"):
        assert {p.shared for p in problems} == {1}, "the case in which they differ"


# ---- rows


def measured(monkeypatch: pytest.MonkeyPatch, seen: dict[int, list[int]], *flags: str) -> Any:
    """The verb on a CPU, where `seen` is what was looked at in batches."""
    monkeypatch.setattr(offline._Bench, "_experts_seen", lambda self, pipeline, batch: seen[batch])
    sizes = ["--batches", ",".join(map(str, seen)), "--contexts", "40", "--prefill", "", "--tokens", "4"]
    arguments = ["bench", "offline", "firebox-tiny", "--device", "cpu", *sizes, *flags, "--json"]
    return CliRunner().invoke(cli.build(), arguments)


def test_a_void_row_has_no_figure_in_the_table_and_is_kept_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    done = measured(monkeypatch, {8: [4] * 6, 4: [11] * 6}, "--load-format", "dummy")
    *lines, last = done.stdout.splitlines()
    void_row, good_row = json.loads(last)["decode"]
    assert done.exit_code == 1
    assert "4.0 distinct experts in 6" in void_row["void"] and "14.4" in void_row["void"]
    assert void_row["ms_per_token"] > 0 and void_row["experts"] == 4.0
    assert good_row["void"] is None and good_row["experts"] == 11.0
    assert good_row["experts_expected"] == pytest.approx(16 * (1 - 0.75**4))
    shown = [line for line in lines if line.startswith("      40")]
    assert shown[0] == f"      40     8  void: {void_row['void']}"
    assert f"{good_row['ms_per_token']:.3f}" in shown[1] and "11.0 of 10.9" in shown[1]


def test_rows_that_are_not_void_exit_0(monkeypatch: pytest.MonkeyPatch) -> None:
    done = measured(monkeypatch, {4: [11] * 6}, "--load-format", "dummy")
    assert done.exit_code == 0 and json.loads(done.stdout.splitlines()[-1])["decode"][0]["void"] is None


def test_a_checkpoint_s_own_routers_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    done = measured(monkeypatch, {8: [4] * 6})
    assert done.exit_code == 0
    (row,) = json.loads(done.stdout.splitlines()[-1])["decode"]
    assert row["void"] is None and row["experts"] == 4.0 and row["experts_expected"] > 14
