"""The recurrence of gated delta nets on an NVIDIA GPU: which of a step's requests go to which kernel, and the
memory between the launches.

    few    the requests that come first in a step and have few tokens, which the scheduler puts there: one
           launch, gated_delta_decode
    many   the others: four launches, gated_delta_chunk, for up to 256 requests at a time
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from firebox.hardware.base import Gpu
from firebox.kernels import gated_delta_chunk, gated_delta_decode
from firebox.kernels._gated_delta import Inputs, Problem, Weights
from firebox.kernels.launch import INTERPRETED, Launcher
from firebox.kernels.plan import Compile, Made
from firebox.layers.dense_gpu import DTYPES

FEW_TOKENS = 8  # of a request, which decode takes one after the other
MOST_REQUESTS = 256  # at a time


def made(problem: Problem, tokens: int, gpu: Gpu) -> Made:
    """What steps of so many tokens may launch, however they are divided among requests. For the plan."""
    return _made(problem, tokens > FEW_TOKENS, gpu)


def turns(problem: Problem, max_tokens: int, gpu: Gpu) -> tuple[int, ...]:
    """See kernels/plan.py."""
    return (FEW_TOKENS + 1,)


@functools.cache
def _made(problem: Problem, many: bool, gpu: Gpu) -> Made:
    decode, chunk = _launchers(problem, gpu)
    config = gated_delta_decode.default(problem, gpu)
    found = [Compile(gated_delta_decode.OP, decode.request, config)]
    for launcher in chunk if many else ():
        config_of_chunk = gated_delta_chunk.default(problem, gpu)
        name = launcher.request.kernel.__name__
        found.append(Compile(gated_delta_chunk.OP, launcher.request, config_of_chunk, name))
    return Made("few and many" if many else "few", "default", tuple(found))


@functools.cache
def _launchers(problem: Problem, gpu: Gpu) -> tuple[Launcher, tuple[Launcher, ...]]:
    decode = gated_delta_decode.request(
        problem, gated_delta_decode.default(problem, gpu), gpu, interpreted=INTERPRETED
    )
    chunk = gated_delta_chunk.requests(
        problem, gated_delta_chunk.default(problem, gpu), gpu, most_requests=MOST_REQUESTS,
        interpreted=INTERPRETED,
    )  # fmt: skip
    return Launcher(decode), tuple(map(Launcher, chunk))


class Workspace:
    """The memory between the launches of layers that are alike, for up to `max_tokens` a step."""

    def __init__(self, problem: Problem, max_tokens: int, device: torch.device | str) -> None:
        self.counters = gated_delta_decode.counters(problem, max_tokens, device)
        self.scratch = gated_delta_chunk.scratch(problem, max_tokens, DTYPES[problem.dtype], device)


@dataclass(frozen=True)
class Part:
    """Successive requests of a step, and their tokens."""

    requests: range
    tokens: range

    def of(self, inputs: Inputs) -> Inputs:
        """What the step brings of these requests."""
        first, end = self.requests.start, self.requests.stop
        starts, slots = inputs.query_start[first : end + 1], inputs.state_slots[first:end]
        return Inputs(**vars(inputs) | {"query_start": starts, "state_slots": slots})


def parts_of(query_start: np.ndarray) -> tuple[Part, list[Part]]:
    """The step's first requests, which have few tokens, and the others, up to MOST_REQUESTS together.
    `query_start` [requests + 1]."""
    many = np.flatnonzero(np.diff(query_start) > FEW_TOKENS)
    requests = len(query_start) - 1
    few = int(many[0]) if len(many) else requests

    def part(first: int, end: int) -> Part:
        return Part(range(first, end), range(int(query_start[first]), int(query_start[end])))

    starts = range(few, requests, MOST_REQUESTS)
    return part(0, few), [part(first, min(first + MOST_REQUESTS, requests)) for first in starts]


class DeltaKernels:
    """The recurrence of one layer; see above. `space` was made for this problem."""

    def __init__(self, problem: Problem, weights: Weights, gpu: Gpu, space: Workspace) -> None:
        self.problem, self._weights, self._space = problem, weights, space
        self._decode, self._chunk = _launchers(problem, gpu)

    def __call__(self, inputs: Inputs, query_start: np.ndarray, states: Any, y: torch.Tensor) -> None:
        """Writes `y` [tokens, heads · value_dim]; advances `states` (a cache.pool.StateCache) of the step's
        requests. `query_start`: that of the inputs, on the host."""
        weights, conv, matrix, space = self._weights, states.conv, states.matrix, self._space
        few, others = parts_of(query_start)
        gated_delta_decode.run(self._decode, few.of(inputs), weights, conv, matrix, space.counters, y)
        for part in others:
            given = part.of(inputs)
            gated_delta_chunk.run(
                self._chunk, self.problem, given, weights, conv, matrix, space.scratch, y, part.tokens
            )
