"""Times launches on the GPU as the engine makes them: in a CUDA graph, on data the L2 does not hold, and
interleaved, so that heat and clocks favour no candidate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], None]


@dataclass(frozen=True)
class Effort:
    """How much time a measurement may take: `samples`, each of them at least `sample_ms` long."""

    samples: int
    sample_ms: float


class Graph:
    """Calls captured one after the other. `ready`: their kernels are loaded, so that none need run before.
    `warm_ms`: the second replay, which sets how often a sample replays, and is the first sample where one
    replay is long enough."""

    def __init__(self, calls: Sequence[Call], *, ready: bool = False) -> None:
        self._calls = len(calls)
        if not ready:
            calls[0]()  # compiles, or takes the binary from disk
        self._graph = _captured(calls)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._replay_ms(1)
        self.warm_ms = self._replay_ms(1)
        self._unused = True

    def sample_us(self, sample_ms: float) -> float:
        """Microseconds of one call, over a sample at least so long."""
        times = max(1, round(sample_ms / max(self.warm_ms, 1e-3)))
        first, self._unused = self._unused, False
        taken_ms = self.warm_ms if first and times == 1 else self._replay_ms(times)
        return taken_ms / self._calls * 1e3

    def _replay_ms(self, times: int) -> float:
        self._start.record()
        for _ in range(times):
            self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / times


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """As torch.cuda.graph does it, without collecting garbage and giving memory back each time: that takes
    longer than most candidates run."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(_stream()):
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    return graph


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def interleaved_us(graphs: Sequence[Graph], effort: Effort) -> list[list[float]]:
    """The samples of each graph, taken in turn: every other round goes backwards."""
    found: list[list[float]] = [[] for _ in graphs]
    for round_ in range(effort.samples):
        order = range(len(graphs)) if round_ % 2 == 0 else range(len(graphs) - 1, -1, -1)
        for i in order:
            found[i].append(graphs[i].sample_us(effort.sample_ms))
    return found
