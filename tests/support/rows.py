"""Runs of an engine with the whole distribution at every position, and how far two runs are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from msgspec.structs import replace

from firebox.engine.messages import SamplingParams, TokenLogprobs
from tests.support.engine import GREEDY, InProcessEngine


@dataclass(frozen=True)
class Run:
    """What became of requests: `tokens` of each, and `rows` of each: log-probabilities [tokens, vocab] from
    which they were chosen, `prompt_rows` [prompt tokens − 1, vocab] those of the prompt."""

    tokens: list[list[int]]
    rows: list[torch.Tensor]
    prompt_rows: list[torch.Tensor]


@dataclass(frozen=True)
class Bound:
    """How far two runs of the same numbers may be apart. `median`: of the rows' errors (see `errors`); a row
    is off if its error is above OFF times that, which a token that is routed to another expert may be, and
    all that attend to it; `off`: the share of such rows."""

    median: float
    off: float

    OFF: ClassVar[float] = (
        5.0  # rows of one model differ in how much they magnify: the worst of 95 % by this much
    )
    DECIDED: ClassVar[float] = 8.0  # errors of a row's two largest numbers: neither is beyond 4 of its 320

    def gap(self, row: torch.Tensor) -> float:
        """Two log-probabilities of `row` [vocab] further apart than this do not change places."""
        return self.DECIDED * self.median * float(row.std())


def run_rows(
    engine: InProcessEngine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    *,
    prompt: bool = False,
) -> Run:
    """All prompts together, to the end; `prompt`: with the rows of the prompts."""
    vocab = engine.ready.vocab_size
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    asked = [replace(p, logprobs=vocab, prompt_logprobs=vocab if prompt else None) for p in each]
    request_ids = [engine.submit(*pair) for pair in zip(prompts, asked, strict=True)]
    found = engine.deltas()
    tokens, rows, prompt_rows = [], [], []
    for request_id in request_ids:
        deltas = found[request_id]
        tokens.append([token_id for delta in deltas for token_id in delta.ids])
        rows.append(_rows([entry for delta in deltas for entry in delta.logprobs or ()], vocab))
        before = [entry for delta in deltas for entry in delta.prompt_logprobs or () if entry is not None]
        prompt_rows.append(_rows(before, vocab))
    return Run(tokens, rows, prompt_rows)


def _rows(entries: Sequence[TokenLogprobs], vocab: int) -> torch.Tensor:
    rows = torch.full((len(entries), vocab), torch.nan)
    for row, entry in zip(rows, entries, strict=True):
        row[torch.tensor(entry.top_ids)] = torch.tensor(entry.top_logprobs)
    return rows


def errors(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of each row [rows, vocab]: RMS of the difference over RMS of what is wanted, both without their mean,
    which logits do not have in common with log-probabilities."""
    assert found.shape == wanted.shape and len(found), (found.shape, wanted.shape)
    return (found - wanted).std(-1) / wanted.std(-1)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, bound: Bound, what: str) -> None:
    """Errors within the bound, and the likeliest token the same wherever the wanted row decides it."""
    off = errors(found, wanted)
    share = (off > bound.OFF * bound.median).float().mean()
    top = wanted.topk(2)
    # a row that is further off than most (see `off`) decides less
    scale = (off / bound.median).clamp(min=1.0)
    gaps = torch.tensor([bound.gap(row) for row in wanted]) * scale
    decided = top.values[:, 0] - top.values[:, 1] > gaps
    other = decided & (found.argmax(-1) != top.indices[:, 0])
    report = (
        f"{what}: median error {off.median():.4f} of {bound.median}, {share:.3f} of {len(off)} rows off "
        f"(limit {bound.off}), {int(decided.sum())} rows decided, {int(other.sum())} of them otherwise"
    )
    print(report)
    assert not found.isnan().any(), f"{report}; NaN"
    assert off.median() <= bound.median and share <= bound.off, report
    assert decided.any(), f"{report}: nothing is decided"
    assert not (other & (off <= bound.OFF * bound.median)).any(), report
    assert other.float().mean() <= bound.off, report


def assert_same_tokens(found: Run, wanted: Run, bound: Bound, what: str) -> None:
    """The same tokens, but where two were as good as equal: at the first that differs, and behind it the runs
    have different prompts. Until there the distributions agree too. Every difference is reported."""
    different, ties, rows, others = [], 0, [], []
    for i, pair in enumerate(zip(found.tokens, wanted.tokens, strict=True)):
        assert len(pair[0]) == len(pair[1]), f"{what}, request {i}: {len(pair[0])} and {len(pair[1])} tokens"
        first = next((t for t, two in enumerate(zip(*pair, strict=True)) if two[0] != two[1]), None)
        until = len(pair[0]) if first is None else first + 1
        rows.append(found.rows[i][:until])
        others.append(wanted.rows[i][:until])
        if first is None:
            continue
        row = wanted.rows[i][first]
        gap = float(row[pair[1][first]] - row[pair[0][first]])
        off = float(errors(found.rows[i][first : first + 1], row.unsqueeze(0)))
        equal = bound.gap(row) * max(1.0, off / bound.median)  # as in assert_close
        ties += gap <= equal
        different.append(f"request {i}, token {first}: {gap:.4f} apart, as good as equal to {equal:.4f}")
    all_off = errors(torch.cat(rows), torch.cat(others))
    share = (all_off > bound.OFF * bound.median).float().mean()
    report = (
        f"{what}: {len(different)} of {len(found.tokens)} requests differ, {ties} of them at a tie; "
        f"median error {all_off.median():.5f}, {share:.3f} of {len(all_off)} rows off\n"
        + "\n".join(different)
    )
    print(report)
    assert all_off.median() <= bound.median and share <= bound.off, report
    assert len(different) - ties <= bound.off * len(found.tokens), report
