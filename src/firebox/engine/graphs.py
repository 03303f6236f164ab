"""Decode steps as CUDA graphs, one for each batch size, captured when that size first occurs. A graph holds
the whole step: embedding, layers, head, and the choice of the next tokens.

What changes from step to step lies in one block of pinned host memory, whose copy to the device is all that
precedes a replay. Host memory is there twice: a step can be filled in while the one before runs.

    numbers [8, rows] int64     token ids | positions | known tokens | slots of full pages, of window pages |
                                seeds | sources | slots of states
    where [rows, …] int32       top_k | context | pages | window pages  (rows of all, then of the next kind)
    odds [3, rows] float32      temperature | top_p | min_p

On the device one block holds the last step's tokens and, behind them, `numbers`. A step that is launched
before the one before has ended does not know its token ids: its sources are rows of those tokens, and of its
own token ids where these are known.

A graph draws by temperature alone. Where a request filters, too, the tokens are drawn once more behind the
graph, by launches of their own; the host waits for neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from firebox.cache.pool import LayerStore, StateCache
from firebox.engine.gpu_sampler import GpuSampler, filters, signed
from firebox.engine.request import Request
from firebox.engine.scheduler import Chunk
from firebox.kernels.sample import Parameters
from firebox.models.base import Model
from firebox.step import Pages, Step

IDS, POSITIONS, KNOWN, SLOTS, WINDOW_SLOTS, SEEDS, SOURCES, STATES = NUMBERS = range(8)
HEAT, TOP_P, MIN_P = ODDS = range(3)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What all graphs of an engine have in common. `max_pages` of a request; `window`, `states`: the model
    has windowed layers, recurrent ones."""

    page_tokens: int
    max_pages: int
    window: bool
    states: bool
    vocab: int

    @property
    def context_tokens(self) -> int:
        """The longest context."""
        return self.max_pages * self.page_tokens


class Launched:
    """A step on its way. `requests`: the rows of its tokens, in order."""

    def __init__(self, requests: Sequence[Request], tokens: torch.Tensor, done: Any) -> None:
        self.requests = tuple(requests)
        self._tokens, self._done = tokens, done

    def token_ids(self) -> list[int]:
        """The next token of each request; waits for the step, and for nothing behind it."""
        self._done.synchronize()
        found: list[int] = self._tokens.tolist()
        return found


class DecodeGraph:
    """One batch size. On the device, written by all graphs: `block` (see `block_of`), and `logits` [most
    rows, vocab] float32."""

    def __init__(
        self,
        rows: int,
        shape: Shape,
        model: Model,
        caches: tuple[LayerStore, ...],
        backend: ModuleType,
        sampler: GpuSampler,
        block: torch.Tensor,
        logits: torch.Tensor,
        pool: Any,
    ) -> None:
        self.rows, self._shape, self._model, self._caches = rows, shape, model, caches
        self._sampler, self._block, self.logits = sampler, block, logits[:rows]
        self._most_rows, self.token_ids = len(logits), block[:rows]
        device, kinds = sampler.device, 2 if shape.window else 1
        self._hosts = [_Host(_Inputs(rows, shape.max_pages, kinds, "cpu"), rows) for _ in range(2)]
        numbers = block[self._most_rows :][: len(NUMBERS) * rows].view(len(NUMBERS), rows)
        self._device = _Inputs(rows, shape.max_pages, kinds, device, numbers)
        self._parameters = self._device.parameters
        self._step = self._make_step(backend)
        self._upload(self._hosts[0].inputs)
        under_way = self.token_ids.clone()  # the step before may not have been read yet
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # compiles, and lets libraries allocate what they keep
            self._forward()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.token_ids.copy_(under_way)
        for cache in caches:
            if isinstance(cache, StateCache):
                cache.clear(0)  # all rows advanced that one
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._forward()

    def _make_step(self, backend: ModuleType) -> Step:
        rows, shape, inputs = self.rows, self._shape, self._device
        query_start, contexts = np.arange(rows + 1), np.ones(rows, np.int64)

        def pages(kind: int, slots: int) -> Pages:
            table = inputs.pages[kind]
            plan = backend.plan(query_start, contexts, table, context_bound=shape.context_tokens)
            paged = dataclasses.replace(plan.paged, page_table=table, context_tokens=inputs.contexts)
            return Pages(inputs.numbers[slots], table, dataclasses.replace(plan, paged=paged))

        return Step(
            positions=inputs.numbers[POSITIONS],
            token_rows=torch.arange(rows, device=self._sampler.device),
            query_start=query_start,
            context_tokens=np.full(rows, shape.context_tokens),
            caches=self._caches,
            full=pages(0, SLOTS),
            window=pages(1, WINDOW_SLOTS) if shape.window else None,
            state_slots=inputs.numbers[STATES] if shape.states else None,
            starts=torch.arange(rows + 1, dtype=torch.int32, device=self._sampler.device)
            if shape.states
            else None,
        )

    def _forward(self) -> None:
        ids = self._block.index_select(0, self._device.numbers[SOURCES])
        logits = self._model.logits(self._model(ids, self._step), self.logits)
        self._sampler.plain(logits, self._parameters, self.token_ids)

    def _upload(self, inputs: _Inputs) -> None:
        for source, target in zip(inputs.tensors, self._device.tensors, strict=True):
            target.copy_(source, non_blocking=True)

    def fill(self, host: _Inputs, chunks: Sequence[Chunk], after: Launched | None) -> None:
        """Writes the step's integers into the host's memory. `after`: the step before, if its tokens are not
        known yet."""
        shape = self._shape
        row_of = {} if after is None else {request: row for row, request in enumerate(after.requests)}
        numbers, where, odds = host.numbers.numpy(), host.where.numpy(), host.odds.numpy()
        top_k, contexts, *tables = host.columns(where)
        for row, chunk in enumerate(chunks):
            request, params, position = chunk.request, chunk.request.params, chunk.start
            holding = request.holding
            assert holding is not None
            page, offset = divmod(position, shape.page_tokens)
            lists = (holding.page_ids, holding.window_page_ids)[: len(tables)]
            for kind, (table, ids) in enumerate(zip(tables, lists, strict=True)):
                table[row, : len(ids)] = ids
                numbers[SLOTS + kind, row] = ids[page] * shape.page_tokens + offset
            numbers[SOURCES, row] = row_of.get(request, self._most_rows + row)
            numbers[IDS, row] = 0 if request in row_of else request.token_ids[position]
            numbers[POSITIONS, row] = position
            numbers[KNOWN, row] = contexts[row] = position + 1
            numbers[STATES, row] = holding.state_slot
            numbers[SEEDS, row] = signed(params.seed or 0)
            odds[:, row] = params.temperature, params.top_p, params.min_p
            top_k[row] = params.top_k

    def replay(self) -> None:
        """Starts the last step once more, without new inputs."""
        self._graph.replay()

    def launch(self, chunks: Sequence[Chunk], after: Launched | None = None) -> Launched:
        """Starts the step and returns at once; `logits` [rows, vocab] will be this step's."""
        self._hosts.reverse()
        host = self._hosts[0]
        host.done.synchronize()  # two launches ago
        self.fill(host.inputs, chunks, after)
        self._upload(host.inputs)
        self.replay()
        if any(filters(chunk.request) for chunk in chunks):
            self._sampler.filtered(self.logits, self._parameters, self.token_ids)
        host.tokens.copy_(self.token_ids, non_blocking=True)
        host.done.record()
        return Launched([chunk.request for chunk in chunks], host.tokens, host.done)


class _Host:
    """Pinned memory of one launch: what goes in, the tokens that come out, and when they have come."""

    def __init__(self, inputs: _Inputs, rows: int) -> None:
        self.inputs = inputs
        inputs.contexts.fill_(1)
        self.tokens = torch.empty(rows, dtype=torch.int64, pin_memory=True)
        self.done = torch.cuda.Event()


class _Inputs:
    """The block, on the host (pinned) or, with `numbers` in a place of its own, on the device."""

    def __init__(
        self,
        rows: int,
        max_pages: int,
        kinds: int,
        device: torch.device | str,
        numbers: torch.Tensor | None = None,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device, pin_memory=numbers is None)

        self._rows, self._max_pages, self._kinds = rows, max_pages, kinds
        self.numbers = zeros(len(NUMBERS), rows, dtype=torch.int64) if numbers is None else numbers
        self.where = zeros(rows * (2 + kinds * max_pages), dtype=torch.int32)
        self.odds = zeros(len(ODDS), rows, dtype=torch.float32)
        self.top_k, self.contexts, *self.pages = self.columns(self.where)
        self.tensors = (self.numbers, self.where, self.odds)

    def columns(self, where: Any) -> tuple[Any, ...]:
        """The parts of `where`, a tensor or an array: top_k, context, and a table of pages for each kind."""
        rows = self._rows
        tables = where[2 * rows :].reshape(self._kinds, rows, self._max_pages)
        return where[:rows], where[rows : 2 * rows], *tables

    @property
    def parameters(self) -> Parameters:
        """How the tokens are drawn."""
        return Parameters(
            self.odds[HEAT], self.numbers[SEEDS], self.numbers[KNOWN], self.top_k, self.odds[TOP_P],
            self.odds[MIN_P],
        )  # fmt: skip


def block_of(max_rows: int, device: torch.device) -> torch.Tensor:
    """[max_rows · 9] int64: the tokens of the last step of any graph, and `numbers` of the one that runs."""
    return torch.zeros(max_rows * (1 + len(NUMBERS)), dtype=torch.int64, device=device)
