"""The roofs of bundled cards against measurements that others published, and against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from firebox.bench.claim import Claim
from firebox.bench.laws import violations
from firebox.bench.roofline import Roofline, roofline
from firebox.errors import ConfigError
from firebox.hardware.base import find_gpu
from firebox.planning.roof import weights_bytes
from tests.support.planning import opened, source_of

GB10 = find_gpu("gb10")


def of(card: str, gpus: int, *, tp: bool = True) -> Roofline:
    return Roofline(opened(card), GB10, gpus, tp)


@pytest.mark.parametrize(
    ("card", "batch", "roof", "measured"),
    [
        ("glm-4.7-nvfp4", 4, 69, {40.6: 0.59}),
        ("glm-4.7-nvfp4", 8, 95, {60.6: 0.64}),
        ("qwen3.5-397b-a17b-nvfp4", 8, 176, {102: 0.58, 143: 0.81, 156: 0.89}),
    ],
)
def test_published_rows(card: str, batch: int, roof: float, measured: dict[float, float]) -> None:
    """Calculated by others from the checkpoints' sizes, with 4 × 273 GB/s."""
    found = of(card, 4).decode_tok_s(batch)
    assert found == pytest.approx(roof, rel=0.015)
    for rate, fraction in measured.items():
        assert rate / found == pytest.approx(fraction, abs=0.012)


def test_garbage_and_good_rows_are_told_apart() -> None:
    line = of("qwen3.5-397b-a17b-nvfp4", 4)

    def law(rate: float) -> list[tuple[str, str]]:
        claim = line.put_on(Claim(concurrency=8, output_tok_s=rate))
        return [(found.law, found.verdict) for found in violations(claim)]

    assert [law(rate) for rate in (93.4, 102.0, 110.9)] == [[], [], []]
    assert [law(rate) for rate in (142, 144.6, 156)] == 3 * [[("garbage_fingerprint", "suspicious")]]
    assert law(200)[0] == ("roofline", "impossible")


def test_drafts_raise_the_roof_by_what_they_keep() -> None:
    """With 3 drafts 4 positions a request are read for; 2.5 of them kept, 2.5 tokens come."""
    line, parts = of("glm-4.7-nvfp4", 4), opened("glm-4.7-nvfp4").parts
    by_hand = 8 * 2.5 * 273e9 / weights_bytes(parts, 4, 32)
    assert line.decode_tok_s(8, drafts=3, accept_length=2.5) == pytest.approx(by_hand)
    assert line.decode_tok_s(8, drafts=3) == pytest.approx(line.decode_tok_s(32))
    assert line.decode_tok_s(8, accept_length=2.5) == pytest.approx(line.decode_tok_s(20))


def test_put_on_a_claim() -> None:
    line = of("glm-4.7-nvfp4", 4)
    claim = line.put_on(Claim(concurrency=8, requests=4, drafts=1))
    assert claim.roof_tok_s == pytest.approx(line.decode_tok_s(16))
    assert claim.roof_request_tok_s == pytest.approx(line.decode_tok_s(2))
    assert line.put_on(Claim(output_tok_s=5)).roof_tok_s is None


def test_a_division_without_remainder_is_never_slower() -> None:
    for card in ("glm-4.7-nvfp4", "qwen3.5-397b-a17b-nvfp4", "qwen3-30b-a3b"):
        for batch in (1, 8, 64):
            assert of(card, 4, tp=False).decode_tok_s(batch) >= of(card, 4).decode_tok_s(batch)


def test_matrix_units_with_prompts() -> None:
    """qwen3-30b-a3b, bf16: 48 layers of 2048 × (2 × 4096 + 2 × 512) in attention, 8 × 3 × 2048 × 768 in
    experts (its router is no matrix that a format stores), twice that in operations, at 119 TFLOP/s."""
    weights = 48 * (2048 * (2 * 4096 + 2 * 512) + 8 * 3 * 2048 * 768)
    assert of("qwen3-30b-a3b", 1).prefill_tok_s == pytest.approx(119e12 / (2 * weights), rel=0.002)
    assert of("qwen3-30b-a3b", 2, tp=False).prefill_tok_s == pytest.approx(119e12 / weights, rel=0.002)


def test_narrow_weights_are_multiplied_at_their_rate() -> None:
    narrow, rate = of("gpt-oss-120b", 1).prefill_tok_s, of("gpt-oss-20b", 1).prefill_tok_s
    assert narrow is not None and rate is not None
    bf16 = 2 * 36 * (2880 * 2 * 4096 + 2880 * 2 * 512 + 2880 * 128) / 119e12
    fp4 = 2 * 36 * 4 * 3 * 2880 * 2880 / 475e12
    assert narrow == pytest.approx(1 / (bf16 + fp4), rel=0.01)


def test_what_cannot_be_answered() -> None:
    with pytest.raises(ConfigError, match=r"cannot be cut with --tp 3: .*vocab_size 201088"):
        roofline(source_of("gpt-oss-120b"), GB10, 3, tp=True)
    assert roofline(source_of("gpt-oss-120b"), GB10, 3).decode_tok_s(1) > 0
    with pytest.raises(ConfigError, match="bandwidth of gb10"):
        roofline(source_of("gpt-oss-20b"), replace(GB10, bandwidth_gb_s=None))
