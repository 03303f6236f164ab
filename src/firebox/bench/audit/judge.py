"""Verdicts: what the laws say of each row alone, and what its neighbours say of it.

    impossible   a law is broken beyond its tolerance
    suspicious   near a border, or with the fingerprint of garbage
    tie          among the best of its concurrency, and their intervals overlap
    possible     every law that could speak agrees
    unknown      no law could speak

Fingerprints of garbage in public matrices (vroomfondel/dgxarley TESTLOGS): eager rows of an NVFP4 model, one
repeated token, are 1.4 to 1.5 × as fast as their neighbours and 82 to 90 % of the bandwidth roof; all
requests of such a row have the same figures to the last digit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import msgspec

from firebox.bench.audit.rows import Row
from firebox.bench.claim import Claim, Ruling
from firebox.bench.laws import monotony, rulings, violations
from firebox.bench.roofline import Roofline

RATES = ("output_tok_s", "decode_tok_s", "output_tok_s_sum", "prefill_tok_s")
"""By which rows are ranked: the first that a row states."""
ABOVE_NEIGHBOURS = 1.35
ABOVE_SHARE = 0.65
"""A rate so far above the median of its neighbours, at so much of the roof, is a fingerprint: configurations
of one server on the same machine rarely differ by a third, and good ones stay below 0.65."""
TWIN_DIGITS = 5
"""Two runs that agree in so many digits are one run, or none."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Of one row. `laws`: the broken ones, the worst first; `nearest`: of a row without, the one that came
    nearest, None where no law could speak. `roof_fraction`: of the bandwidth roof, where it is known."""

    row: Row
    verdict: str
    laws: tuple[Ruling, ...] = ()
    nearest: Ruling | None = None
    roof_fraction: float | None = None

    def document(self) -> dict[str, Any]:
        """As `firebox audit --json` prints it."""
        worst = self.laws[0] if self.laws else None
        claim = msgspec.to_builtins(self.row.claim)
        return {
            "row": self.row.number,
            "label": self.row.label,
            "verdict": self.verdict,
            **{key: worst and getattr(worst, key) for key in ("law", "claimed", "implied", "factor", "why")},
            "broken": [msgspec.to_builtins(law) for law in self.laws],
            "nearest": self.nearest and msgspec.to_builtins(self.nearest),
            "roof_fraction": self.roof_fraction,
            "concurrency": self.row.claim.in_flight,
            "claim": {name: value for name, value in claim.items() if value not in (None, _EMPTY)},
        }


_EMPTY = {"mean": None, "p50": None, "p90": None, "p95": None, "p99": None}


def judge(rows: Sequence[Row], roofline: Roofline | None = None) -> tuple[Verdict, ...]:
    """The verdict of every row, in order."""
    if roofline is not None:
        rows = [msgspec.structs.replace(row, claim=roofline.put_on(row.claim)) for row in rows]
    broken = [list(violations(row.claim)) for row in rows]
    for index, ruling in (*_rising(rows), *_twins(rows), *_above(rows)):
        broken[index].append(ruling)
    verdicts = [_verdict(row, laws) for row, laws in zip(rows, broken, strict=True)]
    tied = set(_tied(verdicts))
    return tuple(
        msgspec.structs.replace(verdict, verdict="tie") if index in tied else verdict
        for index, verdict in enumerate(verdicts)
    )


def _verdict(row: Row, broken: Sequence[Ruling]) -> Verdict:
    laws = tuple(sorted(broken, key=lambda ruling: ruling.verdict != "impossible"))
    spoke = rulings(row.claim)
    nearest = None if laws else max(spoke, key=lambda ruling: ruling.factor, default=None)
    verdict = laws[0].verdict if laws else "possible" if spoke else "unknown"
    return Verdict(row=row, verdict=verdict, laws=laws, nearest=nearest, roof_fraction=share(row.claim))


def share(claim: Claim) -> float | None:
    """Of the bandwidth roof that its decode rate is."""
    rate = claim.output_tok_s or claim.decode_tok_s or claim.output_tok_s_sum
    if rate and claim.roof_tok_s:
        return rate / claim.roof_tok_s
    one = claim.request_tok_s or (1000 / claim.tpot_ms.mean if claim.tpot_ms.mean else None)
    return one / claim.roof_request_tok_s if one and claim.roof_request_tok_s else None


def _rising(rows: Sequence[Row]) -> Iterable[tuple[int, Ruling]]:
    """Rows that are alike but for their concurrency, against `monotony`."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        claim = row.claim
        groups[row.group, claim.input_tokens, claim.output_tokens, claim.depth_tokens].append(index)
    for indices in groups.values():
        for place, ruling in monotony([rows[index].claim for index in indices]).items():
            yield indices[place], ruling


def _twins(rows: Sequence[Row]) -> Iterable[tuple[int, Ruling]]:
    """Rows of different configurations with the same rate to many digits."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        name, rate = _rate(row.claim)
        if rate is not None and len(f"{rate:.10g}".replace(".", "").strip("0")) >= TWIN_DIGITS:
            groups[name, rate].append(index)
    for (_, rate), indices in groups.items():
        if len({rows[index].group for index in indices}) > 1:
            numbers = ", ".join(str(rows[index].number) for index in indices)
            why = f"rows {numbers} have {rate:,.10g} tok/s to the last digit"
            for index in indices:
                yield index, _suspicion("identical_rows", rate, rate, why)


def _above(rows: Sequence[Row]) -> Iterable[tuple[int, Ruling]]:
    """Rows far above their neighbours of the same load, near the roof."""
    for indices in _same_load(rows).values():
        rates = {index: rate for index in indices if (rate := _rate(rows[index].claim)[1])}
        middle = median(rates.values()) if len(rates) > 2 else float("inf")
        for index, rate in rates.items():
            of_roof = share(rows[index].claim)
            if rate > ABOVE_NEIGHBOURS * middle and of_roof is not None and of_roof > ABOVE_SHARE:
                why = f"{rate:,.4g} tok/s, {of_roof:.0%} of the roof, where the median row has {middle:,.4g}"
                yield index, _suspicion("above_neighbours", rate, middle, why)


def _tied(verdicts: Sequence[Verdict]) -> Iterable[int]:
    """The best rows of each load whose intervals overlap with the best one's."""
    for indices in _same_load([verdict.row for verdict in verdicts]).values():
        spans = {i: span for i in indices if (span := _span(verdicts[i])) is not None}
        if not spans:
            continue
        best = max(spans.values(), key=sum)
        among = [i for i, (low, high) in spans.items() if high >= best[0] and low <= best[1]]
        if len(among) > 1:
            yield from among


def _span(verdict: Verdict) -> tuple[float, float] | None:
    name, rate = _rate(verdict.row.claim)
    half = verdict.row.half_width.get(name)
    sound = verdict.verdict in ("possible", "unknown")
    return (rate - half, rate + half) if sound and rate is not None and half is not None else None


def _same_load(rows: Sequence[Row]) -> Mapping[Any, list[int]]:
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        claim = row.claim
        load = (claim.in_flight, claim.input_tokens, claim.output_tokens, claim.depth_tokens)
        groups[_rate(claim)[0], load].append(index)
    return groups


def _rate(claim: Claim) -> tuple[str, float | None]:
    return next(((name, rate) for name in RATES if (rate := getattr(claim, name))), ("", None))


def _suspicion(law: str, claimed: float, implied: float, why: str) -> Ruling:
    return Ruling(
        law=law, claimed=claimed, implied=implied, factor=claimed / implied, verdict="suspicious", why=why
    )
