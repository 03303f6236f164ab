"""The runner of an NVIDIA GPU: decode steps are replayed from CUDA graphs, others run launch by launch."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from firebox.cache.pool import LayerStore
from firebox.engine.graphs import DecodeGraph, GpuSampler, Launched, Shape
from firebox.engine.memory import GRAPHS
from firebox.engine.request import Request
from firebox.engine.runner import GRAPH, Runner, in_words
from firebox.engine.sampler import sample
from firebox.engine.scheduler import Plan, Sampled
from firebox.errors import ConfigError, EngineDied
from firebox.hardware.base import Gpu
from firebox.models.base import Model

NO_GRAPH, CAPTURE_AGAIN_S = "its capture failed", 30.0  # mostly for want of memory, which may come back
log = logging.getLogger(__name__)


class GpuRunner(Runner):
    """`graphs`: "off" or "decode". `overlap`: decode steps may be launched before the last one's tokens are
    known. With `strict` a decode step that no graph can hold is refused at once."""

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
        self._sampler = GpuSampler(vocab, gpu, device)
        self._last_tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        rows = max_rows if graphs != "off" else 0
        self._logits = torch.empty(rows, vocab, dtype=torch.float32, device=device)
        self._overlap = overlap
        self._graphs: dict[int, DecodeGraph] = {}
        self._capture_again_s: dict[int, float] = {}  # batch sizes whose capture failed
        self._pool: Any = torch.cuda.graph_pool_handle() if graphs != "off" else None
        self._why_eager = self._refusal(graphs)
        if strict and self._why_eager:
            raise ConfigError(f"--strict: decode steps run launch by launch: {self._why_eager}")

    @property
    def graph_rows(self) -> int:
        """See Runner.graph_rows."""
        return 0 if self._why_eager else self._last_tokens.numel()

    @property
    def graphs(self) -> int:
        """See Runner.graphs."""
        return len(self._graphs)

    def kept_bytes(self) -> dict[str, int]:
        """See Runner.kept_bytes."""
        return super().kept_bytes() | {GRAPHS: self._logits.nbytes}

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
        token_ids = self.launch(plan).token_ids()
        if _plainly(plan):
            return [Sampled(token_id) for token_id in token_ids]
        graph = self._graph(len(plan.chunks))
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
            torch.cuda.empty_cache()
        except RuntimeError as lost:
            raise EngineDied(f"the GPU can no longer be used: {in_words(lost)}") from error

    def may_overlap(self, plan: Plan) -> bool:
        """Whether `launch` can take this plan, and the next step can follow before its tokens are known."""
        return self._overlap and not self._eager_because(plan) and _plainly(plan)

    @torch.inference_mode()
    def launch(self, plan: Plan, after: Launched | None = None) -> Launched:
        """Starts a decode step and returns at once. `after`: the step before, if its tokens are not known
        yet; requests of it take them from the device."""
        self.steps[GRAPH, "decode"] += 1
        graph = self._graph(len(plan.chunks))
        self._copy_states(plan.state_copies)
        return graph.launch(plan.chunks, after)

    def _eager_because(self, plan: Plan) -> str:
        return self._why_eager or _prefill(plan) or self._no_graph_yet(len(plan.chunks))

    def _no_graph_yet(self, rows: int) -> str:
        return NO_GRAPH if time.monotonic() < self._capture_again_s.get(rows, 0.0) else ""

    def _graph(self, rows: int) -> DecodeGraph:
        if rows not in self._graphs:
            try:
                self._graphs[rows] = self._captured(rows)
            except Exception as error:
                self._capture_again_s[rows] = time.monotonic() + CAPTURE_AGAIN_S
                log.warning(
                    "no graph for steps of %d requests, which run launch by launch for %.0f s: %s",
                    rows, CAPTURE_AGAIN_S, in_words(error),
                )  # fmt: skip
                raise
        return self._graphs[rows]

    def _captured(self, rows: int) -> DecodeGraph:
        assert self.model.attention_backend is not None
        return DecodeGraph(
            rows, self._shape, self.model, self._caches, self.model.attention_backend, self._sampler,
            self._last_tokens, self._logits, self._pool,
        )  # fmt: skip

    def _draw(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
        if any(_needs_host(request) for request in requests):
            return sample(logits.cpu(), requests, self._eos_token_ids)
        return self._sampler.filtered(logits.contiguous(), requests).tolist()


def _prefill(plan: Plan) -> str:
    return "" if all(chunk.count == 1 and chunk.samples for chunk in plan.chunks) else "prefill"


def _plainly(plan: Plan) -> bool:
    return all(_is_drawn_plainly(chunk.request) for chunk in plan.chunks)


def _needs_host(request: Request) -> bool:
    """Do penalties, biases or bans change the logits?"""
    p = request.params
    penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    return penalised or bool(p.logit_bias) or request.output_tokens < p.min_tokens


def _is_drawn_plainly(request: Request) -> bool:
    p = request.params
    filters = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)
    return not filters and p.logprobs is None and not _needs_host(request)
