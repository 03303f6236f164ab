"""The trial of a gated delta net's recurrence: of requests that decode beside prompts, and of prompts alone.
Its launches have one compile each, so there is no other choice to take in their place."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import torch

from firebox.engine._attempt import Result, Setup
from firebox.kernels._gated_delta import Inputs, Problem, Weights, reference
from firebox.layers import delta_gpu
from firebox.layers._invented import relative_error
from firebox.layers.dense_gpu import DTYPES

FEW_LENGTHS = (1, delta_gpu.FEW_TOKENS)  # of the requests that the kernel of few tokens takes
CHUNK_TOKENS = 512
CHECKED_REQUESTS = 3  # of the first, and the last one: the reference goes token by token
# RMS error over the reference's RMS. An output is rounded to bf16 four times on its way, as the reference's
# is: now and then to another side. States are float32, and behind whole chunks sums of products of bf16.
Y_LIMIT, STATE_LIMIT, CHUNK_LIMIT = 5e-3, 1e-4, 1.5e-2


class DeltaTrial:
    """One layer's recurrence, with random states before it."""

    def __init__(self, problem: Problem, setup: Setup) -> None:
        self._p, self._setup, p = problem, setup, problem
        self._generator = setup.generator()
        self._weights = Weights(
            conv=0.5 * self._normal(p.channels, p.taps + 1),
            dt_bias=self._normal(p.heads),
            a_log=self._normal(p.heads),
            norm=(1 + 0.2 * self._normal(p.value_dim)).to(DTYPES[p.dtype]),
        )

    def __call__(self, tokens: int) -> list[Result]:
        """Outputs and both states; of requests with few tokens, and of the others."""
        steps = [_lengths(tokens, FEW_LENGTHS)]
        if tokens > delta_gpu.FEW_TOKENS:
            steps.append(_lengths(tokens, ()))
        return [result for lengths in steps for result in self._run(lengths)]

    def _run(self, lengths: list[int]) -> list[Result]:
        p, setup, tokens = self._p, self._setup, sum(lengths)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        slots = torch.randperm(len(lengths), generator=self._generator, device=setup.device) + 1
        inputs = self._inputs(starts, slots)
        conv = self._normal(len(slots) + 1, p.channels, p.taps)
        matrix = 0.1 * self._normal(len(slots) + 1, p.heads, p.key_dim, p.value_dim)
        states = SimpleNamespace(conv=conv.clone(), matrix=matrix.clone())
        y = setup.nan(tokens, p.heads * p.value_dim, dtype=DTYPES[p.dtype])
        space = delta_gpu.Workspace(p, tokens, setup.device)
        layer = delta_gpu.DeltaKernels(p, self._weights, setup.gpu, space)
        with setup.launching("the recurrence of a gated delta net", tokens):
            layer(inputs, starts, states, y)
        few, others = delta_gpu.parts_of(starts)
        results = []
        for part, name, limits in (
            (few, "few tokens", (Y_LIMIT, STATE_LIMIT)),
            *((part, "chunks", (CHUNK_LIMIT, CHUNK_LIMIT)) for part in others),
        ):
            for requests in _checked(part.requests):
                rows = slice(int(starts[requests[0]]), int(starts[requests[-1] + 1]))
                of_these = slots[list(requests)]
                wanted, *wanted_states = self._reference(inputs, requests, conv, matrix)
                found = (y[rows], states.conv[of_these], states.matrix[of_these])
                expected = (wanted[rows], *(kept[of_these] for kept in wanted_states))
                errors = [relative_error(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
                results += [
                    Result(f"gated delta net of {name}, y", tokens, errors[0], limits[0]),
                    Result(f"gated delta net of {name}, states", tokens, max(errors[1:]), limits[1]),
                ]
        return results

    def _inputs(self, starts: np.ndarray, slots: torch.Tensor) -> Inputs:
        """The four projections, each in rows of the problem's strides."""
        p, tokens = self._p, int(starts[-1])
        widths = (p.channels, p.heads * p.value_dim, p.heads, p.heads)
        mixed, z, b, a = (
            self._normal(tokens, stride).to(DTYPES[p.dtype])[:, :width]
            for stride, width in zip(p.strides or widths, widths, strict=True)
        )
        query_start = torch.from_numpy(starts.astype(np.int32)).to(slots.device)
        return Inputs(mixed=mixed, z=z, a=a, b=b, query_start=query_start, state_slots=slots)

    def _reference(
        self, inputs: Inputs, requests: range, conv: torch.Tensor, matrix: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        part = delta_gpu.Part(requests, range(0))
        return reference(self._p, self._weights, part.of(inputs), conv, matrix)

    def _normal(self, *shape: int) -> torch.Tensor:
        return self._setup.normal(self._generator, *shape)


def _lengths(tokens: int, first: Iterable[int]) -> list[int]:
    """Tokens of each request: the `first` ones as far as there are tokens, the rest in chunks."""
    found: list[int] = []
    for most in first:
        found += [min(most, tokens - sum(found))] if tokens > sum(found) else []
    rest = tokens - sum(found)
    return found + [min(CHUNK_TOKENS, rest - done) for done in range(0, rest, CHUNK_TOKENS)]


def _checked(requests: range) -> list[range]:
    """The first ones and the last one."""
    found = (requests[:CHECKED_REQUESTS], requests[CHECKED_REQUESTS:][-1:])
    return [part for part in found if part]
