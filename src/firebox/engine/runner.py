"""Runs a plan: builds the step's integers, runs the model, samples. `out = runner.run(plan)` is the middle
verb of the engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from firebox.cache.pool import LayerCache
from firebox.engine.messages import TokenLogprobs
from firebox.engine.sampler import sample, token_logprobs
from firebox.engine.scheduler import Chunk, Plan, Sampled
from firebox.models.base import Model
from firebox.step import Step


class Runner:
    """Owns the model and the cache tensors."""

    def __init__(
        self, model: Model, caches: tuple[LayerCache, ...], page_tokens: int, eos_token_ids: frozenset[int]
    ) -> None:
        self.model = model
        self._caches = caches
        self._page_tokens = page_tokens
        self._eos_token_ids = eos_token_ids
        self._device = caches[0].k.device

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Sampled]:
        """One Sampled per chunk, in the plan's order. Writes the step's keys and values to the cache."""
        token_ids, step = self._build(plan)
        hidden = self.model(self._tensor(token_ids), step)  # [tokens, hidden]
        rows = _logits_rows(plan, step.query_start)
        if not any(rows):
            return [Sampled(None)] * len(plan.chunks)
        flat = [row for chunk_rows in rows for row in chunk_rows]
        logits = self.model.logits(hidden if len(flat) == step.tokens else hidden[flat])  # [rows, vocab]
        return self._sample(plan.chunks, logits, [len(chunk_rows) for chunk_rows in rows])

    def _build(self, plan: Plan) -> tuple[np.ndarray, Step]:
        chunks = plan.chunks
        counts = [chunk.count for chunk in chunks]
        query_start = np.zeros(len(chunks) + 1, np.int64)
        np.cumsum(counts, out=query_start[1:])
        tokens = int(query_start[-1])
        token_ids, positions, slots = (np.empty(tokens, np.int64) for _ in range(3))
        held = [chunk.request.holding.page_ids for chunk in chunks if chunk.request.holding is not None]
        page_table = np.zeros((len(chunks), max(map(len, held))), np.int64)
        for r, (chunk, page_ids) in enumerate(zip(chunks, held, strict=True)):
            page_table[r, : len(page_ids)] = page_ids
            first, last, start = query_start[r], query_start[r + 1], chunk.start
            token_ids[first:last] = chunk.request.token_ids[start : start + chunk.count]
            positions[first:last] = np.arange(start, start + chunk.count)
            at = positions[first:last]
            slots[first:last] = (
                page_table[r, at // self._page_tokens] * self._page_tokens + at % self._page_tokens
            )
        context_tokens = np.array([chunk.start + chunk.count for chunk in chunks])
        table = self._tensor(page_table)
        backend = self.model.attention_backend
        step = Step(
            positions=self._tensor(positions),
            token_slots=self._tensor(slots),
            token_rows=self._tensor(np.repeat(np.arange(len(chunks)), counts)),
            page_table=table,
            query_start=query_start,
            context_tokens=context_tokens,
            caches=self._caches,
            attention=backend.plan(query_start, context_tokens, table) if backend else None,
        )
        return token_ids, step

    def _sample(self, chunks: Sequence[Chunk], logits: torch.Tensor, counts: list[int]) -> list[Sampled]:
        """`counts[i]` rows of `logits` belong to chunk i; a sampling chunk's last row chooses its next
        token."""
        ends = np.cumsum(counts)
        sampling = [i for i, chunk in enumerate(chunks) if chunk.samples]
        token_ids: list[int] = []
        if sampling:
            rows = logits if len(sampling) == logits.shape[0] else logits[ends[sampling] - 1]
            token_ids = sample(rows, [chunks[i].request for i in sampling], self._eos_token_ids)
        chosen = dict(zip(sampling, token_ids, strict=True))
        return [self._sampled(chunk, chosen.get(i), logits, int(ends[i])) for i, chunk in enumerate(chunks)]

    @staticmethod
    def _sampled(chunk: Chunk, token_id: int | None, logits: torch.Tensor, end: int) -> Sampled:
        params = chunk.request.params
        logprobs: TokenLogprobs | None = None
        if token_id is not None and params.logprobs is not None:
            (logprobs,) = token_logprobs(logits[end - 1 : end], [token_id], params.logprobs)
        prompt: list[TokenLogprobs] = []
        following = _prompt_tokens_following(chunk)
        if params.prompt_logprobs is not None and following:
            begin = end - chunk.count
            prompt = token_logprobs(logits[begin : begin + len(following)], following, params.prompt_logprobs)
        return Sampled(token_id, logprobs, prompt)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _logits_rows(plan: Plan, query_start: np.ndarray) -> list[range]:
    """Which rows of the step need logits, per chunk: all if its request asks for prompt logprobs, else the
    last if it samples."""
    rows = []
    for chunk, first, last in zip(
        plan.chunks, query_start[:-1].tolist(), query_start[1:].tolist(), strict=True
    ):
        if chunk.request.params.prompt_logprobs is not None and _prompt_tokens_following(chunk):
            rows.append(range(first, last))
        else:
            rows.append(range(last - 1, last) if chunk.samples else range(0))
    return rows


def _prompt_tokens_following(chunk: Chunk) -> list[int]:
    """For each token of the chunk that has one, the prompt token that follows it."""
    request = chunk.request
    return request.token_ids[chunk.start + 1 : min(chunk.start + chunk.count + 1, request.prompt_tokens)]
