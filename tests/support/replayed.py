"""A GPU runner on a CPU: graphs are captured and replayed by running the step again, everything else of
engine/graphs.py and engine/gpu_runner.py is real, but for the choice of tokens where nobody asks for it. For
a process of its own: `torch.cuda` is replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from firebox.cache.pool import StateCache
from firebox.engine import gpu_runner
from firebox.engine.graphs import DecodeGraph, Launched
from firebox.engine.scheduler import Plan
from firebox.hardware.base import Gpu
from firebox.hardware.probe import GpuMemory
from firebox.kernels.sample import Parameters


class Replayed(DecodeGraph):
    """A replay runs the step and writes its results where the capture left them. `inside`: a step of a graph
    runs, perhaps to be captured; `replays`: takes the logits of each replay."""

    inside = False
    replays: ClassVar[list[torch.Tensor]] = []

    def __init__(self, *arguments: Any) -> None:
        caches = arguments[3]

        @contextlib.contextmanager
        def captured(graph: Any, pool: Any) -> Iterator[None]:
            """What is captured does not run; here it does, on the slot of the warm-up."""
            stores = [cache for cache in caches if isinstance(cache, StateCache)]
            states = [state for store in stores for state in (store.conv, store.matrix)]
            before = [state[0].clone() for state in states]
            yield
            for state, kept in zip(states, before, strict=True):
                state[0] = kept

        torch.cuda.graph = captured  # type: ignore[assignment, misc]
        super().__init__(*arguments)
        self._graph = SimpleNamespace(replay=self._again)  # type: ignore[assignment]

    def _forward(self) -> None:
        Replayed.inside = True
        try:
            super()._forward()
        finally:
            Replayed.inside = False

    def _again(self) -> None:
        self._forward()
        Replayed.replays.append(self.logits.clone())  # the next step's will lie there


class Greedy:
    """Instead of a GpuSampler."""

    kept_bytes = 0

    def __init__(self, vocab: int, gpu: Gpu, device: torch.device, max_rows: int) -> None:
        self.device = device

    def plain(self, logits: torch.Tensor, parameters: Parameters, token_ids: torch.Tensor) -> None:
        token_ids.copy_(logits.argmax(-1))

    filtered = plain


class Counted(gpu_runner.GpuRunner):
    """`ahead`: steps that were launched before the last one's tokens were known."""

    ahead = 0

    def launch(self, plan: Plan, after: Launched | None = None) -> Launched:
        self.ahead += after is not None
        return super().launch(plan, after)


def replayed_runner(
    model: Any, caches: Any, page_tokens: int, gpu: Gpu, vocab: int, draws: bool = False, strict: bool = False
) -> Any:
    """A GpuRunner for up to 8 requests of up to 64 tokens. `draws`: as a GPU does, by kernels, under Triton's
    interpreter."""
    nothing = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None, record=lambda: None)
    for name in ("Stream", "current_stream", "Event", "CUDAGraph", "synchronize", "graph_pool_handle"):
        setattr(torch.cuda, name, lambda *arguments: nothing)
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment, misc, return-value]
    for name in ("zeros", "empty"):
        setattr(torch, name, _unpinned(getattr(torch, name)))
    gpu_runner.gpu_memory = lambda: GpuMemory(0, 0, 0, 0)  # type: ignore[assignment]
    if not draws:
        gpu_runner.GpuSampler = Greedy  # type: ignore[misc, assignment]
    gpu_runner.DecodeGraph = Replayed  # type: ignore[misc]
    return Counted(
        model, caches, page_tokens, frozenset(), torch.device("cpu"), gpu,
        context_tokens=64, vocab=vocab, max_rows=8, graphs="decode", overlap=True, strict=strict,
    )  # fmt: skip


def _unpinned(make: Any) -> Any:
    return lambda *shape, pin_memory=False, **options: make(*shape, **options)
