"""Laws that every measurement obeys, whatever the server: one function each, `Claim → Ruling | None`, None
where the claim does not state what the law needs.

    rulings(claim)      what all laws say that can speak
    violations(claim)   those that are broken, worst first
    monotony(claims)    the one law over several rows

Two borders a law. Beyond the first the numbers are suspicious, beyond the second they exclude each other.
Where both are the same, the law is exact and the tolerance is only what rounding in a table costs. "A sweep"
below is a run that keeps `concurrency` requests in flight and ends when the last one has its answer; towards
its end fewer are in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from firebox.bench.claim import Claim, Ruling, Spread

ROUNDING = 1.03
"""Two numbers of three digits each are off by up to 1 %, a nominal duration or length by a little more."""
RATES = 1.10
"""Concurrency × the mean rate of a request: a mean over requests stands for one over tokens. In 50,000
simulated sweeps the wall rate passed it by at most 2.5 % (tests/support/closed_loop.py)."""
TPOT_SUSPICIOUS, TPOT = 1.10, 1.50
"""Concurrency / the mean tpot: a prompt that holds everyone up costs short answers the most a token, so a
mean over requests is too slow. Of 3,600 sweeps with lengths spread evenly, up to 1 : 180, the worst passed it
by 1.6 %; of sweeps with answers of 2 and of 240 tokens at 200 prompt tok/s fewer than 1 % did, though by up
to 5 ×. Such a row is judged wrongly."""
PARTS_SUSPICIOUS, PARTS = 1.40, 1.70
"""Mean output tokens × mean tpot is not the mean of the products, for the same reason: 18 % too much at worst
with lengths spread evenly, 45 % in the worst hundredth of the others. With lengths all alike it is exact."""
MEDIAN_SUSPICIOUS, MEDIAN = 1.75, 2.0 * ROUNDING
"""Half of all requests are at least as long as the median, so the mean is at least half of it: twice is
exact. Medians of honest sweeps were up to 1.5 × as long as the means of which they were made, and up to 1.63
× as long together as the median of their sum."""
PEAK_WINDOW_S = 1.0
"""What tools call peak is the best window of one second."""
UNEXPLAINED_S, UNEXPLAINED = 1.0, 4.0
"""Network, queue and the first decode step are part of a TTFT. Beside one request alone they do not take more
than a second and three quarters of it."""
GARBAGE_SHARE = 0.78
"""Of the datasheet's bandwidth roof. Good servers reach 58 to 64 % of it with GLM-4.7 and Qwen3.5-397B on 4 ×
GB10, broken ones, whose output was one repeated token, 82 to 90 % (vroomfondel/dgxarley's matrices). A GB10
reads at most 85 % of its datasheet bandwidth, and communication, attention and idle time come on top. A
repeated token also takes the same experts again and again, which is why garbage is fast."""
RISING = 1.10
"""Two runs of the same server differ by a few per cent."""

Law = Callable[[Claim], Ruling | None]


def littles_law(claim: Claim) -> Ruling | None:
    """Requests in flight = request rate × mean latency, so output tok/s ≤ concurrency × output tokens / e2e.

    Over the run, the latencies of all requests add up to the integral of requests in flight, which is at
    most concurrency × duration: for mean latencies this holds exactly, and a sweep's tail only lowers the
    rate. Without an e2e, ttft + (output tokens − 1) × tpot is one. An e2e that leaves out the TTFT makes the
    law weaker, never wrong.
    """
    places, rate = claim.in_flight, _request_rate(claim)
    latency = _e2e_ms(claim)
    if places is None or rate is None or latency is None:
        return None
    (per_s, claimed, what), (e2e_ms, kind, suspicious, impossible) = rate, latency
    implied = claimed * places / (per_s * e2e_ms / 1000)
    why = (
        f"{claimed:,.4g} {what} with {kind} {e2e_ms:,.0f} ms needs {per_s * e2e_ms / 1000:,.3g} requests in "
        f"flight; {places:g} allow {implied:,.4g} {what}"
    )
    return _at_most("littles_law", claimed, implied, why, suspicious, impossible)


def sum_of_rates(claim: Claim) -> Ruling | None:
    """A wall rate is below concurrency × the rate of one request, because requests also wait for their first
    token: by the share ttft / e2e. A "throughput" that equals the product is the sum of rates.

    Speaks where that share is at least 5 %, so that the two are apart by more than rounding.
    """
    places, wall, one = claim.in_flight, claim.output_tok_s, _one_request_tok_s(claim)
    ttft, tokens = claim.ttft_ms.mean, claim.output_tokens
    if places is None or wall is None or one is None or ttft is None or tokens is None or tokens < 2:
        return None
    decode_s = (tokens - 1) / one
    implied = places * tokens / (ttft / 1000 + decode_s)
    product = places * one
    if implied * 1.05 > product or abs(wall / product - 1) > 0.02:
        return _ruling("sum_of_rates", wall, product, "possible", "the rate is not the sum of rates")
    why = (
        f"{wall:,.4g} tok/s is {places:g} × {one:,.4g}, the sum of rates; with {ttft:,.0f} ms to the first "
        f"token the wall rate is at most {implied:,.4g}"
    )
    return _ruling("sum_of_rates", wall, implied, "impossible", why)


def tokens_by_latency(claim: Claim) -> Ruling | None:
    """Output tok/s ≤ concurrency × 1000 / tpot: a request in flight brings one token a tpot.

    Its decode time is (n − 1) × tpot, and decode times add up to at most concurrency × duration; n tokens
    come of it, so the border is n / (n − 1) higher where n is known. A request's own rate serves as well.
    """
    places, rate = claim.in_flight, claim.output_tok_s or claim.decode_tok_s
    if places is None or rate is None:
        return None
    tokens = claim.output_tokens or claim.total_output_tokens
    first = tokens / (tokens - 1) if tokens is not None and tokens > 1 else 1.0
    found = _mean_or_median(claim.tpot_ms)
    if found is not None:
        tpot_ms, kind, suspicious, impossible = found
        implied, of = places * 1000 / tpot_ms * first, f"{kind} tpot {tpot_ms:,.4g} ms"
    elif claim.request_tok_s:
        implied, suspicious, impossible = places * claim.request_tok_s * first, RATES, RATES
        of = f"{claim.request_tok_s:,.4g} tok/s a request"
    else:
        return None
    why = f"{rate:,.4g} tok/s; {places:g} requests with {of} bring at most {implied:,.4g}"
    return _at_most("tokens_by_latency", rate, implied, why, suspicious, impossible)


def tokens_by_itl(claim: Claim) -> Ruling | None:
    """Output tok/s ≤ concurrency × 1000 / itl × tokens an event.

    An event of a stream brings `accept_length` tokens, at most drafts + 1. Where neither is known it may be
    more than one, from speculation or from a server that sends several at once: then the law only suspects.
    """
    places, rate, gap = claim.in_flight, claim.output_tok_s or claim.decode_tok_s, claim.itl_ms.mean
    if places is None or rate is None or not gap:
        return None
    known = claim.accept_length or (claim.drafts + 1 if claim.drafts is not None else None)
    an_event = known or 1.0
    tokens = claim.output_tokens
    first = tokens / (tokens - 1) if tokens is not None and tokens > 1 else 1.0
    implied = places * 1000 / gap * an_event * first
    why = (
        f"{rate:,.4g} tok/s; {places:g} streams with {an_event:g} tokens every {gap:,.4g} ms bring at most "
        f"{implied:,.4g}" + ("" if known else "; drafts would explain it, and are not stated")
    )
    return _at_most("tokens_by_itl", rate, implied, why, RATES, RATES if known else float("inf"))


def wall_above_sum(claim: Claim) -> Ruling | None:
    """The wall rate is at most the sum of the rates of requests at once: nobody is faster together."""
    if claim.output_tok_s is None or not claim.output_tok_s_sum:
        return None
    wall, total = claim.output_tok_s, claim.output_tok_s_sum
    why = f"a wall rate of {wall:,.4g} tok/s, and a sum of rates of only {total:,.4g}"
    return _at_most("wall_above_sum", wall, total, why, RATES, RATES)


def peak_below_mean(claim: Claim) -> Ruling | None:
    """The best second has at least the mean rate (vllm-project/vllm#50677 reports one that had not).

    A run of T seconds is covered by T / 1 s windows, rounded up, so the best has at least T / (T + 1 s) of
    the mean. Where the duration is not stated it is taken as ten seconds.
    """
    rate = claim.output_tok_s or claim.decode_tok_s
    if rate is None or not claim.peak_tok_s:
        return None
    duration = claim.duration_s or 10.0
    border = ROUNDING * (duration + PEAK_WINDOW_S) / duration
    why = f"a mean of {rate:,.4g} tok/s above its own peak of {claim.peak_tok_s:,.4g}"
    return _at_most("peak_below_mean", rate, claim.peak_tok_s, why, border, border)


def percentile_order(claim: Claim) -> Ruling | None:
    """p50 ≤ p90 ≤ p95 ≤ p99, and the mean is at least half the median and a hundredth of p99."""
    found = [ruling for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms") for ruling in _order(claim, name)]
    return max(found, key=lambda ruling: ruling.factor, default=None)


def e2e_below_parts(claim: Claim) -> Ruling | None:
    """e2e ≥ ttft + (output tokens − 1) × tpot.

    Exact for one request; over requests whose lengths vary it holds for means up to `PARTS`. Three medians
    are of three different requests: they are suspicious at best. The ttft alone is always within the e2e.
    `claimed` is the sum of the parts, so that a factor above 1 is the wrong side, as everywhere.
    """
    for kind, suspicious, impossible in (
        ("mean", PARTS_SUSPICIOUS, PARTS),
        ("p50", MEDIAN_SUSPICIOUS, float("inf")),
    ):
        e2e, ttft = getattr(claim.e2e_ms, kind), getattr(claim.ttft_ms, kind)
        tpot, tokens = getattr(claim.tpot_ms, kind), claim.output_tokens
        if not e2e or ttft is None:
            continue
        parts, borders = ttft, (ROUNDING, ROUNDING)
        if tpot is not None and tokens is not None and ttft <= e2e:
            parts, borders = ttft + max(tokens - 1, 0) * tpot, (suspicious, impossible)
        why = f"{kind} e2e {e2e:,.0f} ms, and its parts take {parts:,.0f} ms"
        return _at_most("e2e_below_parts", parts, e2e, why, *borders)
    return None


def total_is_sum(claim: Claim) -> Ruling | None:
    """Totals over duration are rates, requests × lengths are totals, input and output are the total.

    Of each pair the stated number may not exceed what the others give; the worst pair speaks. Lengths are
    often those asked for, and answers end earlier, so a smaller total is no contradiction.
    """
    rulings = [
        _at_most("total_is_sum", stated, given, f"{what}: {stated:,.5g} stated, {given:,.5g} implied", b, b)
        for stated, given, what, b in _sums(claim)
        if given > 0
    ]
    return max(rulings, key=lambda ruling: ruling.factor, default=None)


def concurrency_above_requests(claim: Claim) -> Ruling | None:
    """No more requests are in flight than there are. A limit may be higher; a label may not."""
    if claim.concurrency is None or not claim.requests:
        return None
    why = f"labelled concurrency {claim.concurrency:g} with {claim.requests:g} requests in all"
    return _at_most("concurrency_above_requests", claim.concurrency, claim.requests, why, 1.0, 1.0)


def accept_above_drafts(claim: Claim) -> Ruling | None:
    """A step accepts at most its drafts and adds one token."""
    if claim.accept_length is None or claim.drafts is None:
        return None
    why = f"{claim.accept_length:g} tokens a step with {claim.drafts:g} drafts"
    return _at_most("accept_above_drafts", claim.accept_length, claim.drafts + 1, why, 1.01, 1.01)


def roofline(claim: Claim) -> Ruling | None:
    """No server decodes faster than its GPUs can read what a step needs: weights once, the experts its tokens
    take (`bench.roofline`).

    The whole batch has its border, and one request that of a batch of one, however many are beside it.
    Routing is taken as uniform: requests that all have the same text share experts, and only they could pass
    this border.
    """
    found = _of_roof(claim)
    return None if found is None else _at_most("roofline", *found, 1.0, 1.0)


def garbage_fingerprint(claim: Claim) -> Ruling | None:
    """More than `GARBAGE_SHARE` of the roof is suspicious: only broken servers were seen there."""
    found = _of_roof(claim)
    if found is None:
        return None
    rate, roof, why = found
    said = f"{why}; correct servers stay below {GARBAGE_SHARE:.0%}"
    return _at_most("garbage_fingerprint", rate, roof * GARBAGE_SHARE, said, 1.0, float("inf"))


def prefill_roofline(claim: Claim) -> Ruling | None:
    """Prompts are not computed faster than 2 × active parameters operations a token at the GPU's rate. Tokens
    found in a prefix cache are not computed, and do not belong in such a rate."""
    rate, roof = max(claim.prefill_tok_s or 0, claim.input_tok_s or 0), claim.prefill_roof_tok_s
    if not rate or not roof:
        return None
    why = f"{rate:,.5g} prompt tok/s is {rate / roof:.2f} × what the matrix units allow, {roof:,.5g}"
    return _at_most("prefill_roofline", rate, roof, why, 1.0, 1.0)


def prefill_by_ttft(claim: Claim) -> Ruling | None:
    """A prompt rate contradicts the time to the first token: prompt tokens / rate is all that the wait should
    be. (A public table has 770,513 tok/s for 16,384 tokens and 6,155 ms: 2,662 tok/s.)

    All requests at once have waited at most as long as their mean. What is sent with the prompt counts with
    it. A wait is also network and queue: `UNEXPLAINED`.
    """
    rate, ttft, tokens = claim.prefill_tok_s, claim.ttft_ms.mean or claim.ttft_ms.p50, claim.input_tokens
    if not rate or not ttft or not tokens:
        return None
    all_tokens = (tokens + (claim.depth_tokens or 0)) * (claim.in_flight or 1)
    implied = all_tokens / (ttft / 1000)
    unexplained_s = ttft / 1000 - all_tokens / rate
    border = UNEXPLAINED if unexplained_s > UNEXPLAINED_S else float("inf")
    why = f"{rate:,.6g} prompt tok/s; {all_tokens:,.0f} tokens in {ttft:,.0f} ms are {implied:,.5g}"
    return _at_most("prefill_by_ttft", rate, implied, why, UNEXPLAINED / 2, border)


def server_metrics(claim: Claim) -> Ruling | None:
    """The client has not received more tokens than the server's own counter says it made. The server may
    have made more: for other clients, or for requests that failed."""
    if claim.total_output_tokens is None or not claim.server_output_tokens:
        return None
    ours, theirs = claim.total_output_tokens, claim.server_output_tokens
    why = f"{ours:,.0f} output tokens counted, and the server counted {theirs:,.0f}"
    return _at_most("server_metrics", ours, theirs, why, ROUNDING, ROUNDING)


LAWS: tuple[Law, ...] = (
    littles_law,
    tokens_by_latency,
    tokens_by_itl,
    wall_above_sum,
    sum_of_rates,
    roofline,
    garbage_fingerprint,
    prefill_roofline,
    prefill_by_ttft,
    total_is_sum,
    peak_below_mean,
    percentile_order,
    e2e_below_parts,
    concurrency_above_requests,
    accept_above_drafts,
    server_metrics,
)


def rulings(claim: Claim) -> tuple[Ruling, ...]:
    """Of every law that can speak, in the order of `LAWS`."""
    return tuple(ruling for law in LAWS if (ruling := law(claim)) is not None)


def violations(claim: Claim) -> tuple[Ruling, ...]:
    """The broken laws: impossible before suspicious, then the greatest factor, then the order of `LAWS`."""
    broken = [ruling for ruling in rulings(claim) if ruling.broken]
    return tuple(sorted(broken, key=lambda found: (found.verdict != "impossible", -found.factor)))


def monotony(claims: Sequence[Claim]) -> dict[int, Ruling]:
    """A request is not faster for having company: its rate does not rise with concurrency. Of rows that are
    alike but for that; by the index of the row that is too fast. Suspicious, as rows are separate runs."""
    rates = sorted(
        (c.in_flight, i, rate) for i, c in enumerate(claims) if c.in_flight and (rate := _a_place(c))
    )
    found = {}
    for (few, _, slow), (many, index, fast) in pairwise(rates):
        if many > few and fast > slow * RISING:
            why = f"{fast:,.4g} tok/s a request at concurrency {many:g}, {slow:,.4g} at {few:g}"
            found[index] = _ruling("monotony", fast, slow, "suspicious", why)
    return found


def _at_most(
    law: str, claimed: float, implied: float, why: str, suspicious: float, impossible: float
) -> Ruling:
    factor = claimed / implied
    verdict = "impossible" if factor > impossible else "suspicious" if factor > suspicious else "possible"
    return _ruling(law, claimed, implied, verdict, why)


def _ruling(law: str, claimed: float, implied: float, verdict: str, why: str) -> Ruling:
    return Ruling(
        law=law, claimed=claimed, implied=implied, factor=claimed / implied, verdict=verdict, why=why
    )


def _of_roof(claim: Claim) -> tuple[float, float, str] | None:
    """The rate that is nearest to its roof, that roof, and a sentence."""
    batch, one = claim.roof_tok_s, claim.roof_request_tok_s
    pairs = [
        (claim.output_tok_s, batch, "together"),
        (claim.decode_tok_s, batch, "together"),
        (claim.output_tok_s_sum, batch, "added up"),
        (claim.request_tok_s, one, "for one request"),
        (_per_s(claim.tpot_ms.mean), one, "for one request"),
    ]
    known = [(rate, roof, what) for rate, roof, what in pairs if rate and roof]
    if not known:
        return None
    rate, roof, what = max(known, key=lambda pair: pair[0] / pair[1])
    why = f"{rate:,.4g} tok/s {what} is {rate / roof:.0%} of the {roof:,.4g} that memory bandwidth allows"
    return rate, roof, why


def _request_rate(claim: Claim) -> tuple[float, float, str] | None:
    """Requests a second, the stated number that says so, and what that is; the fastest of them."""
    found = []
    if claim.requests_per_s:
        found.append((claim.requests_per_s, claim.requests_per_s, "requests/s"))
    if claim.output_tok_s and claim.output_tokens:
        found.append((claim.output_tok_s / claim.output_tokens, claim.output_tok_s, "tok/s"))
    if claim.requests and claim.duration_s:
        rate = claim.requests / claim.duration_s
        found.append((rate, rate, "requests/s"))
    return max(found, default=None)


def _e2e_ms(claim: Claim) -> tuple[float, str, float, float] | None:
    """Latency, what it is, and from which factor it is suspicious and impossible."""
    if claim.e2e_ms.mean:
        return claim.e2e_ms.mean, "mean e2e", ROUNDING, ROUNDING
    if claim.e2e_ms.p50:
        return claim.e2e_ms.p50, "median e2e", MEDIAN_SUSPICIOUS, MEDIAN
    if not claim.output_tokens:
        return None
    for kind, borders in (("mean", (PARTS_SUSPICIOUS, PARTS)), ("p50", (MEDIAN_SUSPICIOUS, MEDIAN))):
        tpot = getattr(claim.tpot_ms, kind) or _alone(claim, kind)
        ttft = getattr(claim.ttft_ms, kind)
        if tpot and ttft:
            return ttft + max(claim.output_tokens - 1, 0) * tpot, f"{kind} ttft + tpot", *borders
    return None


def _alone(claim: Claim, kind: str) -> float | None:
    """The itl as a tpot, where it is known how many tokens an event brings."""
    an_event = claim.accept_length or (1.0 if claim.drafts == 0 else None)
    gap: float | None = getattr(claim.itl_ms, kind)
    return gap / an_event if gap and an_event else None


def _mean_or_median(spread: Spread) -> tuple[float, str, float, float] | None:
    if spread.mean:
        return spread.mean, "mean", TPOT_SUSPICIOUS, TPOT
    if spread.p50:
        return spread.p50, "median", MEDIAN_SUSPICIOUS, MEDIAN
    return None


def _one_request_tok_s(claim: Claim) -> float | None:
    return claim.request_tok_s or _per_s(claim.tpot_ms.mean)


def _per_s(milliseconds: float | None) -> float | None:
    return 1000 / milliseconds if milliseconds else None


def _a_place(claim: Claim) -> float | None:
    """The rate of one request, or of one place."""
    rate = claim.output_tok_s or claim.decode_tok_s
    return rate / claim.in_flight if rate and claim.in_flight else claim.request_tok_s


def _order(claim: Claim, name: str) -> Iterator[Ruling]:
    spread: Spread = getattr(claim, name)
    points = [
        (key, value) for key in ("p50", "p90", "p95", "p99") if (value := getattr(spread, key)) is not None
    ]
    for (low, lower), (high, upper) in pairwise(points):
        why = f"{name}: {low} {lower:,.4g} above {high} {upper:,.4g}"
        if upper > 0:
            yield _at_most("percentile_order", lower, upper, why, 1.01, 1.01)
    for key, least in (("p50", 0.5), ("p99", 0.01)):
        value = getattr(spread, key)
        if spread.mean and value:
            why = f"{name}: mean {spread.mean:,.4g} with {key} {value:,.4g}: at least {value * least:,.4g}"
            yield _at_most("percentile_order", value * least, spread.mean, why, ROUNDING, ROUNDING)


def _sums(c: Claim) -> Iterator[tuple[float, float, str, float]]:
    """(stated, implied, what, border) of every pair that the claim allows."""
    if c.output_tok_s and c.duration_s and c.total_output_tokens:
        yield c.output_tok_s, c.total_output_tokens / c.duration_s, "output tokens over duration", ROUNDING
    if c.output_tok_s and c.duration_s and c.requests and c.output_tokens:
        implied = c.requests * c.output_tokens / c.duration_s
        yield c.output_tok_s, implied, "requests × output tokens over duration", 1.05
    if c.total_output_tokens and c.requests and c.output_tokens:
        yield c.total_output_tokens, c.requests * c.output_tokens, "requests × output tokens", 1.05
    if c.requests_per_s and c.requests and c.duration_s:
        yield c.requests_per_s, c.requests / c.duration_s, "requests over duration", ROUNDING
    if c.output_tok_s and c.requests_per_s and c.output_tokens:
        yield c.output_tok_s, c.requests_per_s * c.output_tokens, "requests/s × output tokens", 1.05
    if c.input_tok_s and c.duration_s and c.total_input_tokens:
        yield c.input_tok_s, c.total_input_tokens / c.duration_s, "input tokens over duration", ROUNDING
    if c.total_tok_s and c.input_tok_s and c.output_tok_s:
        both = c.input_tok_s + c.output_tok_s
        yield c.total_tok_s, both, "input and output tok/s", ROUNDING
        yield both, c.total_tok_s, "input and output tok/s against the total", ROUNDING
    if c.total_tok_s and c.output_tok_s:
        yield c.output_tok_s, c.total_tok_s, "output within total tok/s", ROUNDING
