"""Each law with a claim computed by hand on either side of its border; honest runs of a simulated server
break none, and the same runs with a doctored number do."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firebox.bench import laws
from firebox.bench.claim import Claim, Spread
from firebox.bench.laws import LAWS, monotony, rulings, violations
from tests.support.closed_loop import Server, claim_of


def ms(mean: float) -> Spread:
    return Spread(mean=mean)


# 512 tokens in 0.4 s + 511 × 50 ms = 25.95 s: 8 places bring 8 × 512 / 25.95 = 157.84 tok/s
LOAD = dict(concurrency=8, output_tokens=512)
PARTS = dict(ttft_ms=ms(400), tpot_ms=ms(50))
Stated = dict[str, object]
BORDERS: list[tuple[str, Stated, Stated, float]] = [
    # law, a claim that holds, what breaks it, the factor of the broken one
    ("littles_law", LOAD | dict(e2e_ms=ms(25_950), output_tok_s=160), dict(output_tok_s=315.68), 2.0),
    ("littles_law", LOAD | PARTS | dict(output_tok_s=200), dict(output_tok_s=280), 280 / 157.84),
    ("littles_law", dict(concurrency=4, e2e_ms=ms(2000), requests_per_s=2.05), dict(requests_per_s=2.2), 1.1),
    (
        "littles_law",
        dict(concurrency=4, e2e_ms=ms(2000), requests=40, duration_s=20),
        dict(duration_s=10),
        2.0,
    ),
    (
        "littles_law",
        dict(concurrency_limit=4, e2e_ms=ms(2000), requests_per_s=2),
        dict(requests_per_s=4),
        2.0,
    ),
    ("tokens_by_latency", dict(concurrency=8, tpot_ms=ms(50), output_tok_s=175), dict(output_tok_s=320), 2.0),
    (
        "tokens_by_latency",
        dict(concurrency=8, request_tok_s=20, decode_tok_s=175),
        dict(decode_tok_s=320),
        2.0,
    ),
    ("tokens_by_itl", dict(concurrency=8, itl_ms=ms(100), drafts=3, output_tok_s=320), dict(drafts=0), 4.0),
    (
        "tokens_by_itl",
        dict(concurrency=8, itl_ms=ms(100), accept_length=2.5, output_tok_s=200),
        dict(accept_length=1.25),
        2.0,
    ),
    ("wall_above_sum", dict(output_tok_s=110, output_tok_s_sum=100), dict(output_tok_s=130), 1.3),
    # 8 × 20 tok/s are 160; with 12.775 s to the first token half of the time brings tokens
    (
        "sum_of_rates",
        LOAD | dict(request_tok_s=20, ttft_ms=ms(12_775), output_tok_s=106.9),
        dict(output_tok_s=160),
        160 / (8 * 512 / (12.775 + 25.55)),
    ),
    ("roofline", dict(output_tok_s=100, roof_tok_s=100), dict(output_tok_s=101), 1.01),
    ("roofline", dict(request_tok_s=28, roof_request_tok_s=28.6), dict(request_tok_s=57.2), 2.0),
    ("prefill_roofline", dict(prefill_tok_s=9999, prefill_roof_tok_s=1e4), dict(prefill_tok_s=2e4), 2.0),
    (
        "prefill_by_ttft",
        dict(concurrency=1, input_tokens=16_384, ttft_ms=ms(6155), prefill_tok_s=2700),
        dict(prefill_tok_s=770_513),
        770_513 / (16_384 / 6.155),
    ),
    (
        "total_is_sum",
        dict(output_tok_s=50, total_output_tokens=5000, duration_s=100),
        dict(duration_s=200),
        2.0,
    ),
    ("total_is_sum", dict(total_output_tokens=5120, requests=10, output_tokens=512), dict(requests=8), 1.25),
    ("total_is_sum", dict(requests_per_s=2, requests=20, duration_s=10), dict(requests_per_s=3), 1.5),
    ("total_is_sum", dict(total_tok_s=300, input_tok_s=200, output_tok_s=100), dict(total_tok_s=600), 2.0),
    ("total_is_sum", dict(total_tok_s=300, input_tok_s=200, output_tok_s=100), dict(total_tok_s=200), 1.5),
    ("total_is_sum", dict(requests_per_s=2, output_tokens=50, output_tok_s=100), dict(output_tok_s=200), 2.0),
    ("peak_below_mean", dict(output_tok_s=48.6, peak_tok_s=48.6), dict(peak_tok_s=24.3), 2.0),
    ("percentile_order", dict(ttft_ms=Spread(p50=3, p90=3, p99=4)), dict(ttft_ms=Spread(p50=6, p90=3)), 2.0),
    ("percentile_order", dict(e2e_ms=Spread(mean=6, p50=10)), dict(e2e_ms=Spread(mean=4, p50=10)), 1.25),
    (
        "e2e_below_parts",
        PARTS | dict(output_tokens=512, e2e_ms=ms(25_950)),
        dict(e2e_ms=ms(12_975)),
        2.0,
    ),
    ("e2e_below_parts", dict(ttft_ms=ms(500), e2e_ms=ms(500)), dict(ttft_ms=ms(550)), 1.1),
    ("concurrency_above_requests", dict(concurrency=8, requests=8), dict(concurrency=16), 2.0),
    ("accept_above_drafts", dict(accept_length=4, drafts=3), dict(accept_length=6), 1.5),
    (
        "server_metrics",
        dict(total_output_tokens=1000, server_output_tokens=1000),
        dict(total_output_tokens=2200),
        2.2,
    ),
]


@pytest.mark.parametrize(("law", "holds", "change", "factor"), BORDERS, ids=[row[0] for row in BORDERS])
def test_both_sides_of_the_border(law: str, holds: dict, change: dict, factor: float) -> None:
    good = getattr(laws, law)(Claim(**holds))
    assert good is not None and good.verdict == "possible", good
    bad = getattr(laws, law)(Claim(**{**holds, **change}))
    assert bad is not None and bad.verdict == "impossible", bad
    assert bad.factor == pytest.approx(factor, rel=2e-3)
    assert bad.factor == bad.claimed / bad.implied
    assert bad.law == law


def test_every_law_has_its_border() -> None:
    assert {law.__name__ for law in LAWS} == {row[0] for row in BORDERS} | {"garbage_fingerprint"}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_law_that_lacks_something_is_silent(law: laws.Law) -> None:
    assert law(Claim()) is None
    for name, holds, change, _ in BORDERS:
        if name != law.__name__ or any(isinstance(v, Spread) and v.p50 for v in change.values()):
            continue
        broken = {**holds, **change}
        alone = [law(Claim(**{key: value})) for key, value in broken.items()]
        assert alone == [None] * len(alone)


def test_garbage_fingerprint() -> None:
    """The rows of Qwen3.5-397B-A17B-NVFP4 on 4 × GB10 at concurrency 8, whose roof is 174 tok/s."""
    for rate, verdict in (
        (102.0, "possible"),
        (135.0, "possible"),
        (142.0, "suspicious"),
        (156.0, "suspicious"),
    ):
        found = laws.garbage_fingerprint(Claim(decode_tok_s=rate, roof_tok_s=174.0))
        assert found is not None and found.verdict == verdict, rate
    both = violations(Claim(decode_tok_s=180, roof_tok_s=174))
    assert [(ruling.law, ruling.verdict) for ruling in both] == [
        ("roofline", "impossible"),
        ("garbage_fingerprint", "suspicious"),
    ]


def test_medians_are_worth_half() -> None:
    """The mean is at least half of the median: twice the border of a mean is impossible, less suspicious."""
    at_one = dict(concurrency=8, output_tokens=100, e2e_ms=Spread(p50=8000))  # 100 tok/s
    verdicts = []
    for rate in (170, 180, 205, 210):
        ruling = laws.littles_law(Claim(**at_one, output_tok_s=rate))
        assert ruling is not None
        verdicts.append(ruling.verdict)
    assert verdicts == ["possible", "suspicious", "suspicious", "impossible"]


def test_an_itl_alone_only_suspects() -> None:
    """Events may bring several tokens: 2.2 × too fast is what drafts look like."""
    found = laws.tokens_by_itl(Claim(concurrency=8, itl_ms=ms(100), output_tok_s=176))
    assert found is not None and found.verdict == "suspicious" and "drafts" in found.why


def test_drafts_explain_an_itl_in_littles_law() -> None:
    fast = Claim(concurrency=1, output_tokens=100, ttft_ms=ms(1), itl_ms=ms(100), output_tok_s=25, drafts=0)
    assert violations(fast)[0].law == "littles_law"
    drafted = msgspec.structs.replace(fast, drafts=2, accept_length=2.6)
    assert violations(drafted) == ()


def test_a_decode_rate_is_not_held_against_the_time_to_first_token() -> None:
    """64 tokens in 6 s + 63 × 20 ms: 8.8 tok/s of wall time, and 50 tok/s at decode are both right."""
    row = dict(concurrency=1, output_tokens=64, ttft_ms=ms(6000), tpot_ms=ms(20))
    assert violations(Claim(**row, decode_tok_s=50)) == ()
    assert violations(Claim(**row, output_tok_s=50))[0].law == "littles_law"


def test_the_worst_comes_first() -> None:
    found = violations(
        Claim(concurrency=8, tpot_ms=ms(50), output_tok_s=248, requests=6, roof_tok_s=200, peak_tok_s=120)
    )
    assert [(r.law, r.verdict) for r in found] == [
        ("peak_below_mean", "impossible"),
        ("tokens_by_latency", "impossible"),
        ("concurrency_above_requests", "impossible"),
        ("roofline", "impossible"),
        ("garbage_fingerprint", "suspicious"),
    ]


def test_monotony() -> None:
    """20 tok/s alone, 22 each of 4 (a tenth more: noise), 30 each of 8."""
    rows = [Claim(concurrency=c, output_tok_s=rate) for c, rate in ((8, 240), (1, 20), (4, 88))]
    found = monotony(rows)
    assert list(found) == [0]
    assert (found[0].claimed, found[0].implied, found[0].verdict) == (30, 22, "suspicious")
    assert monotony(rows[1:]) == {}
    assert monotony([Claim(concurrency=8, output_tok_s=rate) for rate in (100, 200)]) == {}


def test_what_is_sent_with_the_prompt_counts() -> None:
    """2,048 tokens behind a context of 16,384, all computed in 6.155 s: 2,995 tok/s, not 333."""
    row = Claim(input_tokens=2048, depth_tokens=16_384, ttft_ms=ms(6155), prefill_tok_s=2995)
    assert violations(row) == ()
    assert violations(msgspec.structs.replace(row, depth_tokens=None))[0].law == "prefill_by_ttft"


def test_a_limit_above_the_concurrency_allows_no_more() -> None:
    row = dict(e2e_ms=ms(2000), requests_per_s=4)  # 8 in flight
    assert violations(Claim(**row, concurrency=4, concurrency_limit=16))[0].factor == 2
    assert violations(Claim(**row, concurrency=8, concurrency_limit=16)) == ()


def test_a_mean_tpot_is_not_exact() -> None:
    """Between 1.1 and 1.5 × it is suspicious; a request's own rate needs no such room."""
    row = dict(concurrency=8, output_tok_s=208)  # 1.3 × 8 × 20
    slow, one = (violations(Claim(**row, **more)) for more in (PARTS, dict(request_tok_s=20)))
    assert [(r.law, r.verdict) for r in slow] == [("tokens_by_latency", "suspicious")]
    assert [(r.law, r.verdict) for r in one] == [("tokens_by_latency", "impossible")]


_VALUES = st.none() | st.sampled_from([0.0, 1.0]) | st.floats(1e-3, 1e6)
_FIELDS = msgspec.structs.fields(Claim)
_SPREADS = st.builds(Spread, **{f.name: _VALUES for f in msgspec.structs.fields(Spread)})
_CLAIMS = st.builds(Claim, **{f.name: _SPREADS if f.type is Spread else _VALUES for f in _FIELDS})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_CLAIMS)
def test_every_law_survives_every_claim(claim: Claim) -> None:
    for ruling in rulings(claim):
        assert ruling.factor >= 0 and ruling.implied > 0, ruling
        assert ruling.broken <= (ruling.factor > 1), ruling


# ---- a simulated server


def step_s(batch: int) -> float:
    """20 ms for weights that all read, and experts of which 8 of 160 are taken by each, 60 ms for all."""
    return 0.020 + 0.060 * (1 - (1 - 8 / 160) ** batch)


@st.composite
def runs(draw: st.DrawFn, *, alike: bool = False) -> tuple[Server, int, list[tuple[int, int]]]:
    drafts = draw(st.integers(0, 4))
    scale = draw(st.floats(0.1, 3.0))
    server = Server(
        step_s=lambda batch: scale * step_s(batch),
        prefill_tok_s=draw(st.floats(200, 20_000)),
        drafts=drafts,
        acceptance=draw(st.floats(0.0, 1.0)),
        seed=draw(st.integers(0, 2**16)),
    )
    concurrency = draw(st.integers(1, 16))
    least = 6 * concurrency if alike else 1
    chance = random.Random(draw(st.integers(0, 2**16)))
    shortest = draw(st.integers(4, 60))
    longest = shortest if alike else draw(st.integers(shortest, 240))
    prompt = draw(st.integers(1, 4000))
    count = draw(st.integers(least, least + 30))
    lengths = [(chance.randint(1, prompt), chance.randint(shortest, longest)) for _ in range(count)]
    return server, concurrency, lengths


def honest(run: tuple[Server, int, list[tuple[int, int]]]) -> Claim:
    """With the roofs of a machine of which this server reaches 60 %."""
    server, concurrency, lengths = run
    places = min(concurrency, len(lengths))
    claim = claim_of(server.run(concurrency, lengths), places, server)
    kept = server.drafts + 1
    return msgspec.structs.replace(
        claim,
        roof_tok_s=places * kept / (0.6 * server.step_s(places)),
        roof_request_tok_s=kept / (0.6 * server.step_s(1)),
        prefill_roof_tok_s=server.prefill_tok_s / 0.6,
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(runs())
def test_an_honest_run_breaks_no_law(run: tuple[Server, int, list[tuple[int, int]]]) -> None:
    claim = honest(run)
    assert violations(claim) == ()
    spoke = {ruling.law for ruling in rulings(claim)}
    assert {"littles_law", "tokens_by_latency", "tokens_by_itl", "total_is_sum", "roofline"} <= spoke


@settings(max_examples=200, deadline=None, derandomize=True)
@given(runs(), st.data())
def test_nor_does_any_part_of_an_honest_claim(run: tuple[Server, int, list], data: st.DataObject) -> None:
    """Tables state a few of these numbers, and laws derive the others."""
    claim = honest(run)
    names = [f.name for f in msgspec.structs.fields(Claim) if getattr(claim, f.name) is not None]
    kept = data.draw(st.sets(st.sampled_from(names)))
    part = {name: getattr(claim, name) for name in kept}
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        if name in part and data.draw(st.booleans()):
            part[name] = Spread(mean=part[name].mean)
    if claim.drafts:  # without these an itl is not a claim about tokens
        part |= {"drafts": claim.drafts, "accept_length": claim.accept_length}
    assert [r for r in violations(Claim(**part)) if r.verdict == "impossible"] == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(runs(alike=True), st.sampled_from(["e2e_ms", "tpot_ms", "ttft_ms and tpot_ms", "total", "duration"]))
def test_twice_the_throughput_is_always_found(run: tuple[Server, int, list], states: str) -> None:
    """Whatever the row states beside it, of a sweep that is at least six rounds long."""
    claim = honest(run)
    row: dict[str, object] = dict(
        concurrency=claim.concurrency, output_tokens=claim.output_tokens, output_tok_s=2 * claim.output_tok_s
    )
    if states == "total":
        row |= dict(total_output_tokens=claim.total_output_tokens, duration_s=claim.duration_s)
    elif states == "duration":
        row |= dict(requests=claim.requests, duration_s=claim.duration_s)
    elif states == "tpot_ms":
        # waiting for first tokens leaves room under this border; without that wait it is found
        row |= dict(tpot_ms=claim.tpot_ms)
        decode_share = 1 - claim.ttft_ms.mean / claim.e2e_ms.mean
        if decode_share < 0.8:
            return
    else:
        row |= {name: getattr(claim, name) for name in states.split(" and ")}
    found = violations(Claim(**row))
    assert found and found[0].verdict == "impossible"
    assert not math.isclose(found[0].factor, 1.0)


def test_where_a_mean_tpot_misleads() -> None:
    """The known limit: 2-token answers to long prompts beside one of 240 tokens. The run is honest, the mean
    tpot is not that of its tokens; the mean rate, and Little's law with the e2e, are right all the same."""
    server = Server(step_s=step_s, prefill_tok_s=200)
    lengths = [(4000, 2), (4000, 2), (4000, 2), (4, 240)]
    claim = claim_of(server.run(4, lengths), 4, server)
    assert {r.law for r in violations(claim)} <= {"tokens_by_latency", "e2e_below_parts"}
    by_rate = msgspec.structs.replace(claim, tpot_ms=Spread())
    assert violations(by_rate) == ()
