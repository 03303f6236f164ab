"""The runner of an NVIDIA GPU: decode steps are replayed from CUDA graphs, others run launch by launch."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from firebox.cache.pool import LayerStore
from firebox.engine.gpu_sampler import GpuSampler, parameters_of
from firebox.engine.graphs import DecodeGraph, Launched, Shape, block_of
from firebox.engine.memory import GRAPHS, WORKSPACE
from firebox.engine.messages import Captured, TokenLogprobs
from firebox.engine.request import Request
from firebox.engine.runner import GRAPH, Runner, in_words
from firebox.engine.sampler import adjust, is_adjusted
from firebox.engine.scheduler import Plan, Sampled
from firebox.errors import ConfigError, EngineDied
from firebox.hardware.base import Gpu
from firebox.hardware.probe import gpu_memory
from firebox.models.base import Model

NO_GRAPH, CAPTURE_AGAIN_S = "its capture failed", 30.0  # mostly for want of memory, which may come back
SCARCE_BYTES = 2**28
DECODE, WAITED_FOR = "decode", "decode, waited for"  # the second: adjusted logits, or logprobs
log = logging.getLogger(__name__)


class GpuRunner(Runner):
    """`graphs`: "off" or "decode". `overlap`: decode steps may be launched before the last one's tokens are
    known. With `strict` no decode step runs launch by launch: a model that graphs cannot hold is refused at
    once, and the requests of a step whose capture fails run in halves; one that has no graph even alone ends
    with that error."""

    def __init__(
        self,
        model: Model,
        caches: tuple[LayerStore, ...],
        page_tokens: int,
        eos_token_ids: frozenset[int],
        device: torch.device,
        gpu: Gpu,
        *,
        context_tokens: int,
        vocab: int,
        max_rows: int,
        graphs: str,
        overlap: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__(model, caches, page_tokens, eos_token_ids, device)
        self.gpu = gpu
        self._shape = Shape(
            page_tokens, -(-context_tokens // page_tokens), self._has_window, self._has_states, vocab
        )
        self._max_rows, self._overlap, self._strict = max_rows, overlap, strict
        self._sampler = GpuSampler(vocab, gpu, device, max_rows)
        self._block = block_of(max_rows, device)
        rows = max_rows if graphs != "off" else 0
        self._logits = torch.empty(rows, vocab, dtype=torch.float32, device=device)
        self._graphs: dict[int, DecodeGraph] = {}
        self._news: list[Captured] = []
        self._capture_again_s: dict[int, float] = {}  # batch sizes whose capture failed
        self._pool: Any = torch.cuda.graph_pool_handle() if graphs != "off" else None
        self._decide(graphs)

    @property
    def graph_rows(self) -> int:
        """See Runner.graph_rows."""
        return 0 if self._why_eager else self._max_rows

    @property
    def graphs_only(self) -> bool:
        """See Runner.graphs_only."""
        return self._strict and not self._why_eager

    @property
    def graphs(self) -> int:
        """See Runner.graphs."""
        return len(self._graphs)

    def kept_bytes(self) -> dict[str, int]:
        """See Runner.kept_bytes."""
        return super().kept_bytes() | {GRAPHS: self._logits.nbytes, WORKSPACE: self._sampler.kept_bytes}

    def news(self) -> list[Captured]:
        """See Runner.news."""
        found, self._news = self._news, []
        return found

    def _decide(self, graphs: str) -> None:
        self._why_eager = self._refusal(graphs)
        if self._strict and self._why_eager:
            raise ConfigError(f"--strict: decode steps run launch by launch: {self._why_eager}")

    def _refusal(self, graphs: str) -> str:
        """Why no step of this model can be replayed, or ""."""
        if graphs == "off":
            return "asked for"
        backend = self.model.attention_backend
        if backend is None or not hasattr(backend, "refill"):
            return "the attention backend plans on the host"
        return self.model.not_capturable

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Sampled]:
        """As Runner.run."""
        if self._eager_because(plan):
            return super().run(plan)
        on_device = _on_device(plan)
        launched = self._launch(plan, None, DECODE if on_device else WAITED_FOR)
        if on_device:
            return [Sampled(token_id) for token_id in launched.token_ids()]
        graph = self._graphs[len(plan.chunks)]
        return self._sample(plan.chunks, graph.logits, [1] * graph.rows)

    def captured(self, rows: int) -> DecodeGraph | None:
        """As Runner.captured."""
        return self._graphs.get(rows)

    @contextlib.contextmanager
    def eagerly(self, why: str) -> Iterator[None]:
        """As Runner.eagerly."""
        before, self._why_eager = self._why_eager, why
        try:
            yield
        finally:
            self._why_eager = before

    def forget_graphs(self) -> None:
        """Captures anew from now on; another runner that holds the graphs keeps them."""
        self._graphs = {}

    def recover(self, error: Exception) -> None:
        """As Runner.recover. Raises EngineDied when the device's context is lost, as after an illegal
        access: then every call fails from now on."""
        super().recover(error)
        try:
            torch.cuda.synchronize(self._device)
            free_bytes = gpu_memory().free_bytes
            if free_bytes < SCARCE_BYTES:  # of which libraries do not say that they have none
                error.add_note(f"the GPU has {free_bytes / 2**20:.0f} MiB of memory left")
            torch.cuda.empty_cache()
        except RuntimeError as lost:
            raise EngineDied(f"the GPU can no longer be used: {in_words(lost)}") from error

    def may_overlap(self, plan: Plan) -> bool:
        """Whether `launch` can take this plan, and the next step can follow before its tokens are known."""
        return self._overlap and not self._eager_because(plan) and _on_device(plan)

    @torch.inference_mode()
    def launch(self, plan: Plan, after: Launched | None = None) -> Launched:
        """Starts a decode step and returns at once. `after`: the step before, if its tokens are not known
        yet; requests of it take them from the device."""
        return self._launch(plan, after, DECODE)

    def _launch(self, plan: Plan, after: Launched | None, reason: str) -> Launched:
        graph = self._graph(len(plan.chunks))
        self._copy_states(plan.state_copies)
        launched = graph.launch(plan.chunks, after)
        self.steps[GRAPH, reason] += 1
        return launched

    def _eager_because(self, plan: Plan) -> str:
        return self._why_eager or _prefill(plan) or self._no_graph_yet(len(plan.chunks))

    def _no_graph_yet(self, rows: int) -> str:
        waits = time.monotonic() < self._capture_again_s.get(rows, 0.0)
        return NO_GRAPH if waits and not self._strict else ""

    def _graph(self, rows: int) -> DecodeGraph:
        if rows not in self._graphs:
            free_bytes, began_s = gpu_memory().free_bytes, time.monotonic()
            try:
                self._graphs[rows] = self._capture(rows)
            except Exception as error:
                self._capture_again_s[rows], why = time.monotonic() + CAPTURE_AGAIN_S, in_words(error)
                self._news.append(Captured(rows, 0, time.monotonic() - began_s, why))
                then = "in halves" if self._strict else f"launch by launch for {CAPTURE_AGAIN_S:.0f} s"
                log.warning("no graph for steps of %d requests, %s: %s", rows, then, why)
                raise
            taken_bytes = free_bytes - gpu_memory().free_bytes
            self._news.append(Captured(rows, taken_bytes, time.monotonic() - began_s))
        return self._graphs[rows]

    def _capture(self, rows: int) -> DecodeGraph:
        assert self.model.attention_backend is not None
        return DecodeGraph(
            rows, self._shape, self.model, self._caches, self.model.attention_backend, self._sampler,
            self._block, self._logits, self._pool,
        )  # fmt: skip

    def _draw(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
        if any(map(is_adjusted, requests)):
            logits = adjust(logits, requests, self._eos_token_ids)
        token_ids = torch.empty(len(requests), dtype=torch.int64, device=self._device)
        self._sampler.filtered(logits.contiguous(), parameters_of(requests, self._device), token_ids)
        return token_ids.tolist()

    def _logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]
    ) -> list[TokenLogprobs]:
        if max(tops) > self._sampler.most_logprobs:  # no server lets that through
            return super()._logprobs(logits, token_ids, tops)
        return self._sampler.logprobs(logits, token_ids, tops)


def _prefill(plan: Plan) -> str:
    return "" if all(chunk.count == 1 and chunk.samples for chunk in plan.chunks) else "prefill"


def _on_device(plan: Plan) -> bool:
    """Are its tokens all that is wanted, and need nothing but the logits?"""
    requests = [chunk.request for chunk in plan.chunks]
    return not any(request.params.logprobs is not None or is_adjusted(request) for request in requests)
