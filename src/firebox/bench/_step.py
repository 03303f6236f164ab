"""What one decode step consists of, seen in the engine's own process: which experts its tokens meet, what its
graph takes alone, and what runs in it when."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import torch

from firebox.bench._bandwidth import wait_for
from firebox.bench.timer import now

REPLAYS = 20
SHOWN = 12  # kernels of a profile with their names
OTHERS = "others"


class Kernel(msgspec.Struct, frozen=True):
    """Launches of one name within a step, or of all whose names are not shown (OTHERS). `us`: all of them
    together, each counted from when the one before it ended, so that the sum is the step."""

    name: str
    launches: int
    us: float


class Profile(msgspec.Struct, frozen=True):
    """One step, or all steps of a prompt, under the profiler. `total_ms`: from its first kernel's begin to
    its last one's end, which the profiler stretches; `gaps`: the share of it in which no kernel runs. A
    kernel that was launched early and waits for the one before it counts as running, so gaps are what is
    left even so. `kernels`: those that take longest, then the others as one."""

    total_ms: float
    gaps: float
    launches: int
    kernels: list[Kernel]


class Span(NamedTuple):
    """One kernel or copy on the device, in microseconds of the profiler's clock."""

    name: str
    start: float
    end: float


@contextmanager
def experts_looked_at(tokens: int) -> Iterator[list[int]]:
    """Within it, calls of expert layers with so many tokens note how many distinct experts these chose,
    shared ones that the kernels take for further experts left out."""
    from firebox.layers.experts import Experts

    found: list[int] = []
    call = Experts.__call__

    def counted(self: Experts, x: torch.Tensor, expert_ids: torch.Tensor, *rest: Any) -> None:
        if expert_ids.shape[0] == tokens:
            chosen = self.problem.top_k - self.problem.shared  # shared ones come last
            found.append(expert_ids[:, :chosen].unique().numel())
        call(self, x, expert_ids, *rest)

    Experts.__call__ = counted  # type: ignore[method-assign,assignment]
    try:
        yield found
    finally:
        Experts.__call__ = call  # type: ignore[method-assign]


def replay_ms(graph: Any, device: torch.device) -> float:
    """A decode step's graph by itself: the last step again and again, back to back."""
    wait_for(device)
    began = now()
    for _ in range(REPLAYS):
        graph.replay()
    wait_for(device)
    return (now() - began) / REPLAYS * 1e3


def profiled(step: Callable[[], object], device: torch.device) -> Profile | None:
    """One step under torch's profiler; None where it saw no kernel, as on a CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        wait_for(device)
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in found.events() or ()
        if event.device_type.name == "CUDA"
    ]
    return summary(spans) if spans else None


def summary(spans: Sequence[Span]) -> Profile:
    """Of at least one span."""
    spans = sorted(spans, key=lambda span: span.end)
    first, last = min(span.start for span in spans), spans[-1].end
    by_name: dict[str, list[float]] = {}
    for before, span in itertools.pairwise([Span("", first, first), *spans]):
        by_name.setdefault(span.name, []).append(span.end - before.end)
    kernels = [Kernel(name[:60], len(us), round(sum(us), 1)) for name, us in by_name.items()]
    kernels.sort(key=lambda kernel: -kernel.us)
    total = last - first
    gaps = 1 - _busy(spans) / total if total else 0.0
    return Profile(total / 1e3, gaps, len(spans), [*kernels[:SHOWN], *_others(kernels[SHOWN:])])


def _others(kernels: Sequence[Kernel]) -> Iterator[Kernel]:
    if kernels:
        us = round(sum(kernel.us for kernel in kernels), 1)
        yield Kernel(OTHERS, sum(kernel.launches for kernel in kernels), us)


def _busy(spans: Sequence[Span]) -> float:
    """How long at least one of them ran."""
    busy, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return busy


def median(values: Sequence[float]) -> float:
    """The middle one; nan of none."""
    return statistics.median(values) if values else float("nan")
