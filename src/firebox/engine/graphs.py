"""Decode steps as CUDA graphs, one for each batch size, captured when that size first occurs. A graph holds
the whole step: embedding, layers, head, and the choice of the next tokens.

What changes from step to step lies in one block of pinned host memory, whose copy to the device is all that
precedes a replay. Host memory is there twice: a step can be filled in while the one before runs.

    numbers [7, rows] int64     token ids | positions | slots of full pages, of window pages | seeds | rows |
                                slots of states
    where [rows, …] int32       context | pages | window pages       (rows of all, then of the next kind)
    heat [rows] float32         temperatures

A step that is launched before the one before has ended does not know its token ids: they are taken from row
`rows` of the last step's tokens, which stay on the device. −1: the id is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from firebox.cache.pool import LayerStore, StateCache
from firebox.engine.request import Request
from firebox.engine.scheduler import Chunk
from firebox.models.base import Model
from firebox.step import Pages, Step

IDS, POSITIONS, SLOTS, WINDOW_SLOTS, SEEDS, ROWS, STATES = NUMBERS = range(7)


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
    """One batch size. On the device, written by all graphs: `last_tokens` [most rows] int64, which the last
    step of any of them drew, and `logits` [most rows, vocab] float32."""

    def __init__(
        self,
        rows: int,
        shape: Shape,
        model: Model,
        caches: tuple[LayerStore, ...],
        backend: ModuleType,
        sampler: GpuSampler,
        last_tokens: torch.Tensor,
        logits: torch.Tensor,
        pool: Any,
    ) -> None:
        self.rows, self._shape, self._model, self._caches = rows, shape, model, caches
        self._sampler, self._last_tokens, self.logits = sampler, last_tokens, logits[:rows]
        device, kinds = sampler.device, 2 if shape.window else 1
        self._hosts = [_Host(_Inputs(rows, shape.max_pages, kinds, "cpu"), rows) for _ in range(2)]
        self._device = _Inputs(rows, shape.max_pages, kinds, device)
        self._step = self._make_step(backend)
        self._upload(self._hosts[0].inputs)
        under_way = last_tokens.clone()  # the step before may not have been read yet
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # compiles, and lets libraries allocate what they keep
            self._forward()
        torch.cuda.current_stream(device).wait_stream(stream)
        last_tokens.copy_(under_way)
        for cache in caches:
            if isinstance(cache, StateCache):
                cache.clear(0)  # all rows advanced that one
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.token_ids = self._forward()

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

    def _forward(self) -> torch.Tensor:
        inputs = self._device
        rows = inputs.numbers[ROWS]
        ids = torch.where(rows < 0, inputs.numbers[IDS], self._last_tokens[rows.clamp(min=0)])
        hidden = self._model(ids, self._step)
        logits = self._model.logits(hidden, self.logits)
        positions = inputs.numbers[POSITIONS] + 1  # how many tokens are known
        token_ids = self._sampler.plain(logits, inputs.heat, inputs.numbers[SEEDS], positions)
        self._last_tokens[: self.rows] = token_ids
        return token_ids

    def _upload(self, inputs: _Inputs) -> None:
        for source, target in zip(inputs.tensors, self._device.tensors, strict=True):
            target.copy_(source, non_blocking=True)

    def fill(self, host: _Inputs, chunks: Sequence[Chunk], after: Launched | None) -> None:
        """Writes the step's integers into the host's memory. `after`: the step before, if its tokens are not
        known yet."""
        shape = self._shape
        row_of = {} if after is None else {request: row for row, request in enumerate(after.requests)}
        numbers, contexts, pages = (
            host.numbers.numpy(),
            host.contexts.numpy(),
            [p.numpy() for p in host.pages],
        )
        heat = host.heat.numpy()
        for row, chunk in enumerate(chunks):
            request, position = chunk.request, chunk.start
            holding = request.holding
            assert holding is not None
            page, offset = divmod(position, shape.page_tokens)
            lists = (holding.page_ids, holding.window_page_ids)[: len(pages)]
            for kind, (table, ids) in enumerate(zip(pages, lists, strict=True)):
                table[row, : len(ids)] = ids
                numbers[SLOTS + kind, row] = ids[page] * shape.page_tokens + offset
            numbers[ROWS, row] = row_of.get(request, -1)
            numbers[IDS, row] = 0 if request in row_of else request.token_ids[position]
            numbers[POSITIONS, row] = position
            numbers[STATES, row] = holding.state_slot
            numbers[SEEDS, row] = signed(request.params.seed or 0)
            contexts[row] = position + 1
            heat[row] = request.params.temperature

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
    """The block, on the host (pinned) or on the device."""

    def __init__(self, rows: int, max_pages: int, kinds: int, device: torch.device | str) -> None:
        pinned = str(device) == "cpu"

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device, pin_memory=pinned)

        self.numbers = empty(len(NUMBERS), rows, dtype=torch.int64)
        self.numbers[ROWS] = -1
        self.where = empty(rows * (1 + kinds * max_pages), dtype=torch.int32)
        self.heat = empty(rows, dtype=torch.float32)
        self.contexts = self.where[:rows]
        tables = self.where[rows:].view(kinds, rows, max_pages)
        self.pages = list(tables.unbind(0))
        self.tensors = (self.numbers, self.where, self.heat)


class GpuSampler:
    """Draws next tokens on the device (kernels/sample.py): for rows with a temperature only, which every
    graph does, and for rows that filter."""

    def __init__(self, vocab: int, gpu: Any, device: torch.device) -> None:
        from firebox.kernels import sample
        from firebox.kernels.launch import Launcher

        self.device, self._kernel = device, sample
        self._problems = sample.kinds(vocab)
        self._configs = [sample.default(problem, gpu) for problem in self._problems]
        self._launchers = [
            Launcher(sample.request(problem, config, gpu))
            for problem, config in zip(self._problems, self._configs, strict=True)
        ]

    def plain(
        self, logits: torch.Tensor, heat: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """`logits` [rows, vocab] float32, temperatures float32, seeds and positions int64 [rows] → tokens
        [rows] int64."""
        unused = heat
        parameters = self._kernel.Parameters(heat, seeds, positions, unused, unused, unused)
        return self._draw(0, logits, parameters)

    def filtered(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """One token per request, with its top_k, top_p and min_p."""
        params = [request.params for request in requests]

        def numbers(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(self.device)

        parameters = self._kernel.Parameters(
            numbers([p.temperature for p in params], torch.float32),
            numbers([signed(p.seed or 0) for p in params], torch.int64),
            numbers([len(request.token_ids) for request in requests], torch.int64),
            numbers([p.top_k for p in params], torch.int32),
            numbers([p.top_p for p in params], torch.float32),
            numbers([p.min_p for p in params], torch.float32),
        )
        return self._draw(1, logits, parameters)

    def _draw(self, which: int, logits: torch.Tensor, parameters: Any) -> torch.Tensor:
        token_ids = torch.empty(logits.shape[0], dtype=torch.int64, device=self.device)
        problem, config = self._problems[which], self._configs[which]
        scratch = self._kernel.scratch(problem, config, logits.shape[0], self.device)
        self._kernel.run(self._launchers[which], logits, None, parameters, scratch, token_ids)
        return token_ids


def signed(seed: int) -> int:
    """The same 64 bits as an int64."""
    bits = seed % 2**64
    return bits - 2**64 if bits >= 2**63 else bits
