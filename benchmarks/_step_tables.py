"""Two questions to whole decode steps, for benchmarks/engine.py:

    --dips          does a step of any batch take longer than one of the next larger batch? Kernels are chosen
                    and tiled by ranges of tokens
    --smem-limit    what does it cost to stay below 101,376 bytes of shared memory a block?

Reports are those of `firebox bench offline` as JSON. A row that is void or was not measured has no figure,
and where a figure is missing there is no good answer.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# where kernels or their tiles change, both sides of it
SOME = (17, 20, 24, 31, 32, 33, 40, 48, 63, 64, 65, 80, 96, 112, 127, 128, 129, 160, 192, 224, 255, 256)
BATCHES = (*range(1, 17), *SOME)
DIP = 1.03  # so much longer than the next larger batch is a dip, as in _expert_tables.py
SMEM_BYTES = 101_376
MOST_LOSS = 1.05  # of the geometric mean
TURNS = (False, True, True, False)  # limited or not; a GPU that warms up favours neither

Report = dict[str, Any]


def figures(report: Report) -> dict[tuple[int, int], float]:
    """(context, batch) → milliseconds of a step."""
    rows = [row for row in report.get("decode", ()) if row["void"] is None]
    return {(row["context"], row["batch"]): row["ms_per_token"] for row in rows}


# ---- dips


def dips(ms: Mapping[int, float]) -> list[tuple[int, int]]:
    """Of batches and their milliseconds, neighbours of which the smaller takes longer by more than DIP."""
    return [pair for pair in itertools.pairwise(sorted(ms)) if _is_dip(ms, *pair)]


def _is_dip(ms: Mapping[int, float], few: int, more: int) -> bool:
    return few in ms and more in ms and ms[few] > DIP * ms[more]


def measured_dips(batches: Sequence[int], run: Callable[[Sequence[int]], Report]) -> dict[str, Any]:
    """`run`: batches → their report at one context. What looks like a dip is measured a second time, beside
    the largest batch, for which the engine is made, and is one if it looks so again."""
    reports = [run(batches)]
    ms = _by_batch(reports[0])
    suspects, again = dips(ms), dict[int, float]()
    asked_again = sorted({*itertools.chain(*suspects), max(batches)}) if suspects else []
    if suspects:
        reports.append(run(asked_again))
        again = _by_batch(reports[1])
    return {
        "sizes": list(batches),
        "ms": [ms.get(batch) for batch in batches],
        "suspects": [_suspect(pair, ms, again) for pair in suspects],
        "dips": [pair for pair in suspects if _is_dip(again, *pair)],
        "missing": sorted({*batches} - {*ms} | {*asked_again} - {*again}),
        "models": reports,
    }


def _by_batch(report: Report) -> dict[int, float]:
    return {batch: ms for (_, batch), ms in figures(report).items()}


def _suspect(pair: tuple[int, int], ms: Mapping[int, float], again: Mapping[int, float]) -> dict[str, Any]:
    """Both measurements of both batches, in milliseconds."""
    return {"sizes": pair, "ms": [ms[n] for n in pair], "ms_again": [again.get(n) for n in pair]}


def dip_lines(found: dict[str, Any]) -> list[str]:
    """What is printed of measured_dips."""
    lines = []
    for suspect in found["suspects"]:
        (few, more), first, again = suspect["sizes"], suspect["ms"], suspect["ms_again"]
        verdict = "dip" if (few, more) in found["dips"] else "no dip the second time"
        lines.append(
            f"{verdict} at batch {few}: {_ms(first[0])} ms, {_ms(first[1])} at {more}; "
            f"again {_ms(again[0])}, {_ms(again[1])} at {more}"
        )
    if found["missing"]:
        lines.append(f"no figure at batch {', '.join(map(str, found['missing']))}")
    pairs = len(found["sizes"]) - 1
    return [*lines, f"dips of more than {DIP - 1:.0%}: {len(found['dips'])} of {pairs}"]


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


# ---- with and without a limit


def measured_limit(run: Callable[[bool], Report]) -> dict[str, Any]:
    """`run`: limited or not → a report. Each is there twice, and a row's figures are means. What neither side
    holds, as a pool that is too small, is not a row."""
    reports = [run(limited) for limited in TURNS]
    each = [figures(report) for report in reports]
    wanted = dict.fromkeys(at for found in each for at in found)
    rows = [_limit_row(at, each) for at in wanted if all(at in found for found in each)]
    missing = [at for at in wanted if any(at not in found for found in each)]
    known = rows and not missing
    return {
        "smem_bytes": SMEM_BYTES,
        "rows": rows,
        "missing": missing,
        "ratio": statistics.geometric_mean(row["ratio"] for row in rows) if known else None,
        "models": reports,
    }


def _limit_row(at: tuple[int, int], each: Sequence[Mapping[tuple[int, int], float]]) -> dict[str, Any]:
    ms, limited_ms = (
        statistics.mean(found[at] for found, limited in zip(each, TURNS, strict=True) if limited is side)
        for side in (False, True)
    )
    context, batch = at
    return {
        "context": context, "batch": batch, "ms": ms, "limited_ms": limited_ms, "ratio": limited_ms / ms,
    }  # fmt: skip


def limit_lines(found: dict[str, Any]) -> list[str]:
    """What is printed of measured_limit."""
    lines = [f"{'context':>8}{'batch':>6}{'ms/token':>10}{'limited':>10}{'loss':>9}"]
    lines += [
        f"{row['context']:>8}{row['batch']:>6}{row['ms']:>10.3f}{row['limited_ms']:>10.3f}"
        f"{row['ratio'] - 1:>9.1%}"
        for row in found["rows"]
    ]
    lines += [f"no figure at context {context} batch {batch}" for context, batch in found["missing"]]
    if found["ratio"] is None:
        return [*lines, "loses nobody knows what: a figure is missing"]
    verdict = "at most" if acceptable(found) else "more than"
    loss, most = found["ratio"] - 1, MOST_LOSS - 1
    return [*lines, f"loses {loss:.1%} within {found['smem_bytes']} bytes: {verdict} {most:.0%}"]


def acceptable(found: dict[str, Any]) -> bool:
    """Is the loss known, and at most MOST_LOSS?"""
    return found["ratio"] is not None and found["ratio"] <= MOST_LOSS
