"""Runs a plan: builds the step's integers, runs the model, samples. `out = runner.run(plan)` is the middle
verb of the engine."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from firebox.cache.pool import LayerStore, StateCache, kept_bytes
from firebox.cache.specs import RecurrentSpec, WindowSpec
from firebox.engine.messages import Captured, TokenLogprobs
from firebox.engine.request import Request
from firebox.engine.sampler import sample, token_logprobs
from firebox.engine.scheduler import Chunk, Plan, Sampled
from firebox.models.base import Model
from firebox.step import Pages, Step

GRAPH, EAGER = "graph", "eager"


class Runner:
    """Owns the model and the cache tensors. `steps` counts them by (mode, reason)."""

    def __init__(
        self,
        model: Model,
        caches: tuple[LayerStore, ...],
        page_tokens: int,
        eos_token_ids: frozenset[int],
        device: torch.device,
    ) -> None:
        self.model = model
        self._caches = caches
        self._page_tokens = page_tokens
        self._eos_token_ids = eos_token_ids
        self._device = device
        self.steps = Counter[tuple[str, str]]()
        self._has_window = any(isinstance(spec, WindowSpec) for spec in model.cache_specs)
        self._has_states = any(isinstance(spec, RecurrentSpec) for spec in model.cache_specs)
        stacks = (cache.stack for cache in caches if isinstance(cache, StateCache))
        self._stacks = list({id(stack): stack for stack in stacks}.values())

    @property
    def caches(self) -> tuple[LayerStore, ...]:
        """The tensors behind pages and slots, one store a layer."""
        return self._caches

    def captured(self, rows: int) -> Any:
        """The graph of a decode step of so many requests, if there is one by now."""
        return None

    def eagerly(self, why: str) -> contextlib.AbstractContextManager[None]:
        """Within it no step comes from a graph; they are counted under `why`."""
        return contextlib.nullcontext()

    @property
    def graph_rows(self) -> int:
        """Decode steps of up to so many tokens are replayed from graphs; 0: none."""
        return 0

    @property
    def graphs(self) -> int:
        """How many have been captured."""
        return 0

    @property
    def graphs_only(self) -> bool:
        """Decode steps are never to run launch by launch."""
        return False

    def news(self) -> list[Captured]:
        """Graphs captured, or not, since this was last asked."""
        return []

    def kept_bytes(self) -> dict[str, int]:
        """See cache.pool.kept_bytes; and what else was allocated with these."""
        return kept_bytes(self.model.cache_specs, self._caches)

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Sampled]:
        """One Sampled per chunk, in the plan's order. Writes the step's keys and values to the cache."""
        self.steps[EAGER, self._eager_because(plan)] += 1
        self._copy_states(plan.state_copies)
        query_start = np.cumsum([0, *(chunk.count for chunk in plan.chunks)])
        rows = _logits_rows(plan, query_start)
        token_ids, step = self._build(plan.chunks, query_start, list(chain.from_iterable(rows)))
        hidden = self.model(self._tensor(token_ids), step)  # [wanted rows, hidden]
        if not len(hidden):
            return [Sampled(None)] * len(plan.chunks)
        return self._sample(plan.chunks, self.model.logits(hidden), [len(chunk_rows) for chunk_rows in rows])

    def recover(self, error: Exception) -> None:
        """Makes ready for another step after one that raised: what its frames hold is let go of. Raises
        EngineDied where no step can follow."""
        known: BaseException | None = error
        while known is not None:
            traceback.clear_frames(known.__traceback__)
            known = known.__cause__ or known.__context__

    def may_overlap(self, plan: Plan) -> bool:
        """Whether the step after this one may be launched before this one's tokens are known (`launch`)."""
        return False

    def launch(self, plan: Plan, after: Any = None) -> Any:
        """Starts a step that `may_overlap`, for its `token_ids()` to be asked later."""
        raise AssertionError("this runner's steps do not overlap")

    def _eager_because(self, plan: Plan) -> str:
        """Why this step does not come from a graph, or ""."""
        return "no graphs on a CPU"

    def _copy_states(self, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            for stack in self._stacks:
                stack.copy(source, target)

    def _build(
        self, chunks: Sequence[Chunk], query_start: np.ndarray, wanted: list[int]
    ) -> tuple[np.ndarray, Step]:
        """The step's token ids, and the step, whose hidden states are `wanted` of these rows."""
        token_ids = np.concatenate([c.request.token_ids[c.start : c.start + c.count] for c in chunks])
        positions = np.concatenate([np.arange(c.start, c.start + c.count) for c in chunks])
        rows = np.repeat(np.arange(len(chunks)), np.diff(query_start))
        context_tokens = np.array([chunk.start + chunk.count for chunk in chunks])
        holdings = [chunk.request.holding for chunk in chunks if chunk.request.holding is not None]

        def pages(lists: list[list[int]], backend: Any) -> Pages:
            return self._pages(lists, backend, positions, rows, query_start, context_tokens)

        step = Step(
            positions=self._tensor(positions),
            token_rows=self._tensor(rows),
            query_start=query_start,
            context_tokens=context_tokens,
            caches=self._caches,
            full=pages([holding.page_ids for holding in holdings], self.model.attention_backend),
            window=pages([holding.window_page_ids for holding in holdings], self.model.attention_backend)
            if self._has_window
            else None,
            state_slots=self._tensor(np.array([holding.state_slot for holding in holdings]))
            if self._has_states
            else None,
            starts=self._tensor(query_start.astype(np.int32)) if self._has_states else None,
            outputs=self._tensor(np.array(wanted, np.int64)) if len(wanted) < len(token_ids) else None,
        )
        return token_ids, step

    def _pages(
        self,
        lists: list[list[int]],
        backend: Any,
        positions: np.ndarray,
        rows: np.ndarray,
        query_start: np.ndarray,
        context_tokens: np.ndarray,
    ) -> Pages:
        table = np.zeros((len(lists), max(map(len, lists))), np.int64)
        for row, page_ids in enumerate(lists):
            table[row, : len(page_ids)] = page_ids
        page, offset = np.divmod(positions, self._page_tokens)
        slots = table[rows, page] * self._page_tokens + offset
        tensor = self._tensor(table)
        plan = backend.plan(query_start, context_tokens, tensor) if backend else None
        return Pages(self._tensor(slots), tensor, plan)

    def _sample(self, chunks: Sequence[Chunk], logits: torch.Tensor, counts: list[int]) -> list[Sampled]:
        """`counts[i]` rows of `logits` belong to chunk i; a sampling chunk's last row chooses its next
        token."""
        ends = np.cumsum(counts)
        sampling = [i for i, chunk in enumerate(chunks) if chunk.samples]
        token_ids: list[int] = []
        if sampling:
            rows = logits if len(sampling) == logits.shape[0] else logits[ends[sampling] - 1]
            token_ids = self._draw(rows, [chunks[i].request for i in sampling])
        chosen = dict(zip(sampling, token_ids, strict=True))
        logprobs = self._logprobs_of(chunks, chosen, logits, ends)
        return [
            Sampled(chosen.get(i), logprobs.get(i), self._prompt_logprobs(chunk, logits, int(ends[i])))
            for i, chunk in enumerate(chunks)
        ]

    def _logprobs_of(
        self, chunks: Sequence[Chunk], chosen: dict[int, int], logits: torch.Tensor, ends: np.ndarray
    ) -> dict[int, TokenLogprobs]:
        """Of the chosen tokens, for the chunks whose requests want them."""
        tops = {i: chunks[i].request.params.logprobs for i in chosen}
        wanted = {i: top for i, top in tops.items() if top is not None}
        if not wanted:
            return {}
        rows = logits[ends[list(wanted)] - 1]
        found = self._logprobs(rows, [chosen[i] for i in wanted], list(wanted.values()))
        return dict(zip(wanted, found, strict=True))

    def _prompt_logprobs(self, chunk: Chunk, logits: torch.Tensor, end: int) -> list[TokenLogprobs]:
        """Of the prompt's tokens behind those of the chunk, whose rows of `logits` end at `end`."""
        top, following = chunk.request.params.prompt_logprobs, _prompt_tokens_following(chunk)
        if top is None or not following:
            return []
        begin = end - chunk.count
        return self._logprobs(logits[begin : begin + len(following)], following, [top] * len(following))

    def _draw(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
        """The next token of each request from `logits` [requests, vocab]."""
        return sample(logits, requests, self._eos_token_ids)

    def _logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]
    ) -> list[TokenLogprobs]:
        """Of `token_ids` [rows] under `logits` [rows, vocab], each with its `tops` [rows] alternatives."""
        return token_logprobs(logits, token_ids, tops)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def in_words(error: BaseException) -> str:
    """An error's kind and first line, and what was noted of it."""
    first = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:300]}"
    return "; ".join([first, *getattr(error, "__notes__", ())])


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
