"""The roof against figures that were measured and calculated elsewhere, and against arithmetic by hand."""

from __future__ import annotations

import pytest

from firebox.hardware.base import find_gpu
from firebox.models.base import decode_bytes
from firebox.planning._parts import shard_bytes
from firebox.planning.memory import CacheBytes
from firebox.planning.roof import Roof, roof
from firebox.text.folder import bundled
from tests.support.planning import opened, planned


def roof_of(card: str, gpu: str = "h200", tp: int = 1, **engine: object) -> Roof:
    found = planned(card, gpu, tp, **engine).roof
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("card", "published"),
    [
        # weights a step, GB, as our benchmark of another server counted them from the checkpoint
        ("gpt-oss-120b", {1: 5.00, 8: 16.8, 64: 56.2}),
        ("qwen3-30b-a3b", {1: 6.08, 8: 25.8}),
    ],
)
def test_weights_of_a_step(card: str, published: dict[int, float]) -> None:
    steps = roof_of(card).steps
    for batch, gigabytes in published.items():
        assert steps[batch].weights / 1e9 == pytest.approx(gigabytes, rel=0.003), batch


def test_gpt_oss_120b_takes_1_17_ms_at_the_rate_of_a_copy() -> None:
    assert roof_of("gpt-oss-120b").steps[1].weights / 4.262e12 * 1e3 == pytest.approx(1.17, abs=0.005)


def test_tokens_per_second() -> None:
    """At 4096 tokens of context: 18 layers keep them all, 18 keep 128, 2048 bytes each."""
    found = roof_of("gpt-oss-120b")
    cache = (4096 + 128) * 18 * 2048
    assert (found.steps[1].cache, found.steps[8].cache) == (cache, 8 * cache)
    assert found.bytes_per_token == found.steps[1].weights + cache
    assert found.tokens_per_s(8) == pytest.approx(8 * 4600e9 / (found.steps[8].weights + 8 * cache))
    assert found.weights_only_tokens_per_s(1) == pytest.approx(4600e9 / found.steps[1].weights)
    assert set(found.document()["tokens_per_s"]) == {"1", "8", "64"}


def test_a_context_shorter_than_the_window() -> None:
    assert roof_of("gpt-oss-20b", context_length=100).steps[1].cache == 100 * 24 * 2048


@pytest.mark.parametrize("card", [name for name in bundled() if name != "firebox-tiny"])
def test_one_token_reads_what_the_model_says(card: str) -> None:
    """models.base.decode_bytes walks the model by itself; it rounds down once a layer."""
    model = opened(card).model
    expected = decode_bytes(model, lambda slot: shard_bytes(slot, 1))
    assert roof_of(card).steps[1].weights == pytest.approx(expected, abs=len(model.blocks))


def test_states_are_read_and_written() -> None:
    parts = opened("gpt-oss-20b").parts
    without, with_state = (
        roof(parts, CacheBytes(10, 0, 0, state), find_gpu("h200"), 1, 1000).steps[8].cache
        for state in (0, 300)
    )
    assert (without, with_state) == (8 * 10_000, 8 * 10_600)


def test_two_gpus_are_not_quite_twice_as_fast() -> None:
    """Routers, norms and biases are read by both."""
    one, two = (roof_of("gpt-oss-120b", "h200", tp).tokens_per_s(1) for tp in (1, 2))
    assert 1.97 < two / one < 2.0


@pytest.mark.parametrize(
    ("gpu", "gb_s", "measured"), [("gb10", 231, True), ("h200", 4600, True), ("rtx-5090", 1792, False)]
)
def test_measured_bandwidth_where_there_is_one(gpu: str, gb_s: float, measured: bool) -> None:
    found = roof_of("gpt-oss-20b", gpu)
    assert (found.bandwidth_gb_s, found.measured) == (gb_s, measured)
    assert ("datasheet" in found.document()["bandwidth"]) is not measured
