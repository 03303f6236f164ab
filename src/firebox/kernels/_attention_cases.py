"""The attention kernels' reference, and what tests, tuner and benchmark run them on.

Whatever a kernel must not read is NaN: pages that no request owns, page 0, and the rows of a page behind its
request's last token. Page 0 is also what the page table says of pages that a window has left behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from firebox.kernels._attention import FP8, TREE_QUERIES, Paged, Problem, pack_tree

# RMS error over the reference's RMS, by the coarsest type that a result passes through. An output rounded to
# bf16 is off by 1.7e-3 (2^-9 uniform, in relative terms), weights rounded before they meet their values add
# less; an eighth of that in fp16; sums in float32 of some hundred terms are off by 1e-7 each.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Case:
    """A layer and a step: (queries, context) of each request. `splits` is for decode alone."""

    problem: Problem
    requests: tuple[tuple[int, int], ...]
    window_tokens: int = 0
    splits: int = 1

    def of(self, dtype: torch.dtype, kv_dtype: torch.dtype) -> Case:
        """The same in other types."""
        sinks = None if self.problem.sinks is None else dtype
        problem = replace(self.problem, dtype=dtype, kv_dtype=kv_dtype, sinks=sinks)
        return replace(self, problem=problem)

    @property
    def tolerance(self) -> float:
        """See TOLERANCES."""
        return max(TOLERANCES[self.problem.dtype], TOLERANCES[self.problem.dot_dtype])


def attention(problem: Problem, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The formula of _attention.py in float32, request by request, from what `make` made: [tokens, heads,
    value_dim]."""
    out = []
    for request, (queries, context) in enumerate(inputs["requests"]):
        first = int(inputs["query_start"][request])
        q = inputs["q"][first : first + queries].float().transpose(0, 1)  # [heads, queries, head_dim]
        pages = inputs["page_table"][request, : -(-context // problem.page_tokens)].long()
        k, v = (
            (_pages(cache, pages)[:context].float() * scale)
            .transpose(0, 1)
            .repeat_interleave(problem.group, 0)
            for cache, scale in zip((inputs["k_cache"], inputs["v_cache"]), inputs["scales"], strict=True)
        )  # [heads, context, dim]
        seen = visible(queries, context, inputs["window_tokens"], inputs["tree"], request).to(q.device)
        v = v.masked_fill(~seen.any(0).unsqueeze(-1), 0.0)  # a weight of zero does not undo a NaN
        scores = (q @ k.transpose(1, 2) * inputs["scale"]).masked_fill(~seen, -math.inf)
        if inputs["sinks"] is not None:
            sink = inputs["sinks"].float().view(-1, 1, 1).expand(-1, queries, 1)
            scores = torch.cat((scores, sink), dim=-1)
        out.append((scores.softmax(-1)[..., :context] @ v).transpose(0, 1))
    return torch.cat(out)


def _pages(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Rows of these pages, as bytes where torch cannot index the type."""
    if cache.itemsize > 1:
        return cache[pages].flatten(0, 1)
    return cache.view(torch.uint8)[pages].view(cache.dtype).flatten(0, 1)


def visible(queries: int, context: int, window_tokens: int, tree: torch.Tensor | None, request: int) -> Any:
    """Which keys each query sees, [queries, context] bool."""
    prefix = context - queries
    own = torch.ones(queries, queries, dtype=torch.bool).tril()
    if tree is not None and queries <= TREE_QUERIES:
        own = tree[request, :queries, :queries].cpu()
    seen = torch.cat((torch.ones(queries, prefix, dtype=torch.bool), own), dim=1)
    if window_tokens:
        position = prefix + own.sum(-1, keepdim=True) - 1
        seen[:, :prefix] &= torch.arange(prefix) > position - window_tokens
        if tree is None or queries > TREE_QUERIES:
            seen &= torch.arange(context) > position - window_tokens
    return seen


def make(case: Case, seed: int = 0, device: str = "cpu", spare_pages: int = 3) -> dict[str, Any]:
    """Random queries, and keys and values in scattered pages: what `attention` reads, and `paged` for a
    kernel. `spare_pages` belong to nobody."""
    problem, generator = case.problem, torch.Generator().manual_seed(seed)
    owned = [-(-context // problem.page_tokens) for _, context in case.requests]
    order = (torch.randperm(sum(owned) + spare_pages, generator=generator) + 1).tolist()
    page_table = torch.zeros(len(owned), max(*owned, 1) + 1, dtype=torch.int32)
    shape = (len(order) + 1, problem.page_tokens, problem.kv_heads)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    k_cache = torch.full((*shape, problem.head_dim), torch.nan)
    v_cache = k_cache if problem.latent else torch.full((*shape, problem.value_dim), torch.nan)
    for request, (queries, context) in enumerate(case.requests):
        reached = max(0, context - queries - case.window_tokens + 1) if problem.window else 0
        for start in range(
            reached // problem.page_tokens * problem.page_tokens, context, problem.page_tokens
        ):
            page, rows = order.pop(), min(problem.page_tokens, context - start)
            page_table[request, start // problem.page_tokens] = page
            k_cache[page, :rows] = normal(rows, problem.kv_heads, problem.head_dim)
            if not problem.latent:
                v_cache[page, :rows] = normal(rows, problem.kv_heads, problem.value_dim)
    k_cache = k_cache.to(problem.kv_dtype).to(device)
    v_cache = k_cache[..., : problem.value_dim] if problem.latent else v_cache.to(problem.kv_dtype).to(device)
    counts = [queries for queries, _ in case.requests]
    query_start = np.cumsum([0, *counts])
    contexts = np.array([context for _, context in case.requests])
    tree = _trees(counts, generator) if problem.tree else None
    bits, depths = (None, None) if tree is None else pack_tree(tree.to(device), query_start)
    on_device, starts = (torch.from_numpy(a).to(device, torch.int32) for a in (contexts, query_start))
    return {
        "requests": case.requests,
        "q": normal(sum(counts), problem.heads, problem.head_dim).to(problem.dtype).to(device),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "page_table": page_table.to(device),
        "context_tokens": contexts,
        "query_start": query_start,
        "paged": Paged(page_table.to(device), on_device, starts, bits, depths),
        "tree": tree,
        "sinks": normal(problem.heads).to(problem.sinks).to(device) if problem.sinks else None,
        "window_tokens": case.window_tokens,
        "scale": problem.head_dim**-0.5 * (2.0 if problem.kv_dtype == FP8 else 1.0),
        "scales": ((0.5, 0.5) if problem.latent else (0.5, 2.0)) if problem.kv_dtype == FP8 else (1.0, 1.0),
    }


def _trees(counts: list[int], generator: torch.Generator) -> torch.Tensor:
    """[requests, queries, queries] bool: every token but a request's first has a random earlier one for its
    parent, and sees it and what that sees."""
    width = max(count for count in counts if count <= TREE_QUERIES)
    trees = torch.eye(width, dtype=torch.bool).repeat(len(counts), 1, 1)
    for tree in trees:
        for token in range(1, width):
            parent = int(torch.randint(token, (), generator=generator))
            tree[token] |= tree[parent]
    return trees


DECODE_CASES = (
    Case(Problem(2, 2, 64, 64, 16), ((1, 1),)),
    Case(Problem(8, 2, 128, 128, 16), ((1, 5), (1, 33), (0, 0), (1, 1), (1, 601), (0, 9)), splits=3),
    Case(Problem(8, 1, 64, 64, 64, sinks=torch.bfloat16), ((1, 1037), (1, 64)), splits=9),
    Case(Problem(16, 1, 64, 64, 16, window=True), ((1, 200), (1, 3), (4, 61)), window_tokens=5, splits=2),
    Case(Problem(2, 1, 64, 64, 64), ((1, 9000), (1, 700)), splits=36),
    Case(
        Problem(4, 1, 64, 64, 4, window=True, sinks=torch.bfloat16), ((3, 611), (1, 7)), window_tokens=523,
        splits=5,
    ),
    Case(Problem(6, 2, 192, 192, 16), ((1, 530), (2, 35)), splits=2),
    Case(Problem(2, 1, 256, 256, 32), ((1, 1100), (1, 31)), splits=4),
    Case(Problem(16, 1, 576, 512, 64), ((1, 319), (2, 65)), splits=2),
    Case(Problem(128, 1, 576, 512, 16), ((1, 19),)),
    Case(Problem(12, 1, 128, 128, 64), ((4, 130), (1, 1), (2, 2), (16, 16)), splits=4),
    Case(Problem(8, 2, 64, 64, 16, tree=True), ((6, 570), (1, 9), (3, 3)), splits=8),
    Case(
        Problem(2, 1, 64, 64, 64, tree=True, window=True, sinks=torch.bfloat16), ((7, 300), (5, 20)),
        window_tokens=16,
    ),
    Case(Problem(16, 1, 576, 512, 64, tree=True), ((5, 319), (1, 7), (3, 65)), splits=2),
)  # fmt: skip

EXTEND_CASES = (
    Case(Problem(2, 2, 64, 64, 16), ((23, 23),)),
    Case(Problem(8, 2, 128, 128, 16), ((1, 70), (0, 0), (31, 31), (16, 48), (0, 5), (9, 40), (1, 1))),
    Case(Problem(8, 1, 128, 128, 64, sinks=torch.bfloat16), ((5, 300), (37, 165), (64, 64))),
    Case(Problem(16, 1, 64, 64, 16, window=True), ((33, 100), (7, 7)), window_tokens=5),
    Case(
        Problem(4, 1, 64, 64, 128, window=True, sinks=torch.bfloat16), ((70, 300), (3, 211)),
        window_tokens=131,
    ),
    Case(Problem(6, 2, 192, 192, 16), ((50, 90), (3, 3))),
    Case(Problem(2, 1, 256, 256, 32), ((33, 177),)),
    Case(Problem(16, 1, 576, 512, 64), ((9, 150), (2, 2))),
    Case(Problem(128, 1, 576, 512, 16), ((2, 35),)),
    Case(Problem(24, 2, 128, 128, 64), ((21, 85),)),
    Case(Problem(8, 2, 64, 64, 16, tree=True), ((20, 170), (70, 90), (3, 3))),
    Case(Problem(2, 1, 64, 64, 64, tree=True, window=True), ((64, 300), (5, 20)), window_tokens=70),
    Case(Problem(16, 1, 576, 512, 64, tree=True), ((18, 150), (2, 2))),
)  # fmt: skip
