"""Attention of one layer on this GPU, for tuning: random keys in scattered pages, in so many pools that no
call finds its own in the L2. Page 0, which nobody owns, is NaN."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from firebox.attention.triton_paged import Attended, decode, extend, plan
from firebox.hardware.base import Gpu
from firebox.kernels._attention_cases import Case, attention
from firebox.kernels._attention_choice import DECODE
from firebox.layers._invented import relative_error
from firebox.tuning._attention_estimate import Problem
from firebox.tuning.base import Candidate
from firebox.tuning.clock import Call

COLD = 4  # times the L2: what a graph reads before it reads the same again
MOST_POOLS = 256
CHECKED_QUERIES = 32  # of the first request's first, and of the last request's last


class AttentionBench:
    """See tuning.base.Bench."""

    def __init__(self, problem: Problem, gpu: Gpu, tokens: int) -> None:
        self.problem, self._gpu = problem, gpu
        layer, self._requests = problem.layer, problem.requests(tokens)
        self._generator = torch.Generator("cuda").manual_seed(1)
        self._page_table = self._pages()
        pages = int(self._page_table.max()) + 1
        shape = (pages, layer.page_tokens, layer.kv_heads, layer.head_dim)
        pool_bytes = math.prod(shape) * layer.kv_dtype.itemsize * (1 if layer.latent else 2)
        pools = min(MOST_POOLS, 1 + COLD * gpu.l2_bytes // pool_bytes)
        self._pools = [self._pool(shape) for _ in range(pools)]
        self._starts = np.cumsum([0, *(queries for queries, _ in self._requests)])
        contexts = np.array([context for _, context in self._requests])
        self._plan = plan(self._starts, contexts, self._page_table)
        heads = (tokens, layer.heads)
        self._q = self._random((*heads, layer.head_dim), layer.dtype)
        self._out = torch.empty(*heads, layer.value_dim, dtype=layer.dtype, device="cuda")
        self._sinks = self._random((layer.heads,), layer.sinks) if layer.sinks else None

    def _pages(self) -> torch.Tensor:
        """[requests, pages of a context] int32, scattered; 0 for pages that a window has left behind."""
        queries, context = self._requests[0]  # all are alike
        size, window = self.problem.layer.page_tokens, self.problem.window_tokens
        behind = max(0, context - queries - window + 1) // size if window else 0
        owned = (len(self._requests), -(-context // size) - behind)
        order = torch.randperm(math.prod(owned), generator=self._generator, device="cuda") + 1
        left = torch.zeros(owned[0], behind, dtype=torch.int64, device="cuda")
        return torch.cat((left, order.view(owned)), dim=1).int()

    def _pool(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.problem.layer
        k = self._random(shape, layer.kv_dtype, first=torch.nan)
        if layer.latent:
            return k, k[..., : layer.value_dim]
        return k, self._random(shape, layer.kv_dtype, first=torch.nan)

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype, first: float | None = None) -> torch.Tensor:
        """N(0, 1); `first`: what the first row is instead."""
        drawn = torch.float16 if dtype.itemsize == 1 else dtype
        values = torch.empty(shape, dtype=drawn, device="cuda").normal_(generator=self._generator)
        if first is not None:
            values[0] = first
        return values.to(dtype)

    # ---- calls

    def calls(self, candidate: Candidate) -> list[Call]:
        """What the engine launches, once for each pool."""
        run = decode if self.problem.kernel == DECODE else extend
        return [functools.partial(run, step, candidate.config) for step in self._steps]

    def whole(self, path: str, parts: Mapping[str, Candidate]) -> list[Call]:
        """The same."""
        (candidate,) = parts.values()
        return self.calls(candidate)

    def further(self, path: str, parts: Mapping[str, Candidate]) -> list[Call]:
        """Nothing is launched besides."""
        return []

    @functools.cached_property
    def _steps(self) -> list[Attended]:
        p, layer = self.problem, self.problem.layer
        further = (layer, self._gpu, p.window_tokens, self._sinks)
        return [
            Attended(self._q, k, v, (1.0, 1.0), self._plan, layer.head_dim**-0.5, self._out, *further)
            for k, v in self._pools
        ]

    # ---- the oracle

    def error(self, candidate: Candidate) -> tuple[float, float]:
        """Of the first request's first queries and the last one's last; no output may be left as it was."""
        self._out.fill_(torch.nan)
        self.calls(candidate)[0]()
        limit = Case(self.problem.layer, ()).tolerance
        if not torch.isfinite(self._out).all():
            return float("inf"), limit
        found = torch.cat([self._out[first : first + count] for _, first, count in self._checked])
        return relative_error(found.float(), self._wanted), limit

    @property
    def _checked(self) -> list[tuple[int, int, int]]:
        """Request, first token and how many of its tokens."""
        last, end = len(self._requests) - 1, int(self._starts[-1])
        counts = [min(CHECKED_QUERIES, self._requests[request][0]) for request in (0, last)]
        return [(0, 0, counts[0]), (last, end - counts[1], counts[1])]

    @functools.cached_property
    def _wanted(self) -> torch.Tensor:
        return torch.cat([self._formula(*part) for part in self._checked])

    def _formula(self, request: int, first: int, count: int) -> torch.Tensor:
        """As if these tokens were all that the request had computed."""
        queries, context = self._requests[request]
        seen = context - queries + first + count - int(self._starts[request])
        k, v = self._pools[0]
        inputs: dict[str, Any] = {
            "requests": ((count, seen),),
            "query_start": [0, count],
            "q": self._q[first : first + count],
            "k_cache": k,
            "v_cache": v,
            "page_table": self._page_table[request : request + 1],
            "window_tokens": self.problem.window_tokens,
            "tree": None,
            "sinks": self._sinks,
            "scale": self.problem.layer.head_dim**-0.5,
            "scales": (1.0, 1.0),
        }
        return attention(self.problem.layer, inputs)
