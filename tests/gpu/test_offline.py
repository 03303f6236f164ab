"""`firebox bench offline` on a real GPU: what its rows say can be true. Two layers of a card."""

from __future__ import annotations

import pytest

from firebox.bench._offline import Decode, Offline, Settings
from firebox.bench.offline import measure
from firebox.config import Config, EngineConfig, ModelConfig
from firebox.text.folder import resolve_folder

pytestmark = [pytest.mark.gpu, pytest.mark.alone]  # and the pool takes what memory others leave

BATCHES, CONTEXTS = (1, 8, 64), (128, 4096)


def run(card: str, *, granted: bool = True, contexts: tuple[int, ...] = CONTEXTS) -> Offline:
    model = ModelConfig(model=str(resolve_folder(card)), load_format="dummy", dtype="bfloat16", layers=2)
    engine = EngineConfig(device="cuda", max_batch_tokens=8192, prefill_chunk_tokens=8192, page_tokens=64)
    prefills = (2048,) if granted else ()
    return measure(
        Settings(
            config=Config(model=model, engine=engine), name=card, batches=BATCHES, contexts=contexts,
            prefills=prefills, tokens=48, granted=granted,
        )
    )  # fmt: skip


@pytest.fixture(scope="module", params=["qwen3-30b-a3b", "gpt-oss-120b", "glm-4.5-air-fp8"])
def report(request: pytest.FixtureRequest) -> Offline:
    return run(request.param)


def test_every_row_is_there_and_comes_from_graphs(report: Offline) -> None:
    assert not report.not_measured, report.not_measured
    assert [(row.context, row.batch) for row in report.decode] == [(c, b) for c in CONTEXTS for b in BATCHES]
    assert all(row.modes == {"graph/decode": 48} for row in report.decode), [
        row.modes for row in report.decode
    ]


def test_the_parts_of_a_step_make_the_step(report: Offline) -> None:
    for row in report.decode:
        print(row.context, row.batch, f"{row.ms_per_token:.4f} {row.replay_ms:.4f} {row.share_of_roof:.3f}")
        assert row.replay_ms is not None and 0 < row.replay_ms < 1.1 * row.ms_per_token
        assert 0 < row.share_of_roof < 1.5, "two layers may fit the L2; five times the roof would be wrong"
        assert row.profile is not None and 0 <= row.profile.gaps < 1 and row.profile.launches > 8
        total_us = row.profile.total_ms * 1e3
        assert sum(kernel.us for kernel in row.profile.kernels) == pytest.approx(total_us, rel=0.001, abs=1)
        assert sum(kernel.launches for kernel in row.profile.kernels) == row.profile.launches
        assert row.profile.total_ms < 5 * row.replay_ms + 0.5, "the profiler stretches, but not so"


def test_routing_spreads(report: Offline) -> None:
    for row in report.decode:
        assert row.experts is not None and row.experts_expected is not None
        print(row.batch, f"{row.experts:.1f} distinct experts, {row.experts_expected:.1f} expected")
        assert row.void is None, row.void
    first = report.decode[0]
    assert first.experts == pytest.approx(first.experts_expected), "a token's choices, no shared expert"


def test_longer_contexts_take_longer(report: Offline) -> None:
    at: dict[tuple[int, int], Decode] = {(row.context, row.batch): row for row in report.decode}
    assert at[4096, 64].ms_per_token > at[128, 64].ms_per_token
    (prompt,) = report.prefill
    assert prompt.ttft_ms > at[128, 1].ms_per_token and 0 < prompt.share_of_roof < 1
    assert "matrix" in prompt.roof
    assert prompt.profile is not None and prompt.profile.total_ms < 5 * prompt.ttft_ms + 0.5
    of_prompt, of_step = prompt.profile, at[128, 64].profile
    print(f"prompt: {prompt.ttft_ms:.1f} ms, {of_prompt.launches} launches, gaps {of_prompt.gaps:.1%}")
    assert of_step is not None and of_step.launches / 3 < of_prompt.launches < 3 * of_step.launches


def test_granted_contexts_cost_what_computed_ones_do() -> None:
    card = "qwen3-30b-a3b"
    both = [run(card, granted=granted, contexts=(2048,)) for granted in (True, False)]
    assert not any(report.not_measured for report in both), [report.not_measured for report in both]
    for granted, computed in zip(*(report.decode for report in both), strict=True):
        print(granted.batch, f"{granted.ms_per_token:.4f} granted, {computed.ms_per_token:.4f} computed")
        assert granted.ms_per_token == pytest.approx(computed.ms_per_token, rel=0.2)
