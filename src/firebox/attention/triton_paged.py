"""Attention on NVIDIA GPUs, in Triton, straight from the pages: no keys are copied or gathered beforehand.

Requests of up to 16 queries (decode, drafts) go to kernels/attention_decode.py, which divides long contexts
among blocks; longer ones (prefill) to kernels/attention_extend.py. A step that has both launches both; each
writes its own requests' rows.

A plan's arrays lie on the device and keep their addresses: a step captured in a CUDA graph is replayed after
`refill` with the integers of another step of as many requests and tokens a request. Its grid is then that of
`context_bound`, and blocks that have nothing to do end at once.

Tiles are measured ones (kernels/_tuned.py, attention.json) where there are any: those of the nearest number
of tokens in the step. A measured tile of decode serves requests whose rows make blocks as large as its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from firebox.attention.base import KvSpec, LatentSpec
from firebox.cache.pool import LayerCache
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import _attention_choice
from firebox.kernels._attention_choice import (
    DECODE,
    EXTEND,
    choice_of,
    decode_config,
    decode_tile,
    extend_config,
    failed,
    measured,
    splits,
)

if TYPE_CHECKING:  # Triton is imported where there is a GPU, and not before
    from firebox.kernels._attention import Config, Paged, Problem
    from firebox.kernels._veto import Choice
    from firebox.kernels.plan import Made


TUNED = _attention_choice.TUNED_FILE  # the file in tuned/<gpu>/
TUNED_EVERYWHERE = False  # a GPU without such a file runs default tiles by rule


def key(problem: Problem) -> str:
    """How attention.json calls a problem of decode. Extend has one default for all and need not be there."""
    return _attention_choice.key(DECODE, problem)


@dataclass(frozen=True)
class Plan:
    """`paged`: the step's integers on the device; on the host `query_start` [requests + 1] and
    `context_tokens` [requests]. `decode_queries`: the most queries of a request that decode serves, 0 if it
    serves none; `decode_contexts`: tokens of the longest of these, and of all divided by the requests.
    `tiles`: extend's, for each (group, block_m) once."""

    paged: Paged
    query_start: np.ndarray
    context_tokens: np.ndarray
    decode_queries: int
    decode_contexts: tuple[int, int]
    tiles: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @functools.cached_property
    def single(self) -> bool:
        """Has every request one query, and no tree?"""
        return self.paged.tree_bits is None and bool((np.diff(self.query_start) == 1).all())


def accepts(heads: int, spec: KvSpec, gpu: Gpu) -> str | None:
    """NVIDIA GPUs; head_dim 64, 128, 192, 256, and latent rows of 512 + 64."""
    if gpu.kind != "cuda":
        return "runs on NVIDIA GPUs"
    from firebox.kernels._attention import unsupported

    if isinstance(spec, LatentSpec):
        return unsupported(heads, 1, spec.latent_dim + spec.rope_dim, spec.latent_dim)
    return unsupported(heads, spec.kv_heads, spec.head_dim, spec.head_dim)


def made(problem: Problem, tokens: int, gpu: Gpu) -> Made:
    """What steps of so many tokens may launch, however they are divided among requests: decode for each
    number of queries that a request may have, its keys divided or not, and extend. For the plan."""
    from firebox.kernels.attention_decode import MAX_QUERIES

    tuned = tuple(measured(kernel, problem, gpu, tokens) for kernel in (DECODE, EXTEND))
    return _made(problem, min(tokens, MAX_QUERIES + 1), tuned, failed(problem, gpu, tokens), gpu)


def nearest_fit(problem: Problem, tokens: int, gpu: Gpu) -> Made:
    """The same with default tiles, for who asks what would fit where tuned ones do not."""
    from firebox.kernels.attention_decode import MAX_QUERIES

    return _made(problem, min(tokens, MAX_QUERIES + 1), (None, None), "", gpu)


def turns(problem: Problem, max_tokens: int, gpu: Gpu) -> Iterator[int]:
    """See kernels/plan.py: those of either kernel's tiles, and one request's up to where extend begins."""
    from firebox.kernels import _tuned
    from firebox.kernels.attention_decode import MAX_QUERIES

    yield from range(1, MAX_QUERIES + 2)
    for kernel in (DECODE, EXTEND):
        yield from _tuned.turns(gpu.name, TUNED, _attention_choice.key(kernel, problem))


@functools.cache
def _made(problem: Problem, tokens: int, tuned: tuple[Config | None, ...], instead: str, gpu: Gpu) -> Made:
    from firebox.kernels import attention_decode, attention_extend
    from firebox.kernels.plan import Compile, Made

    def choice(kernel: str, config: Config) -> Choice | None:
        """Of a measured tile; nothing stands in for a default."""
        return choice_of(kernel, problem, config) if config in tuned else None

    found: list[Compile] = []
    queries = range(1, min(tokens, attention_decode.MAX_QUERIES) + 1)
    for config in dict.fromkeys(decode_tile(problem, gpu, n, tuned[0]) for n in queries):
        tile, vetoed = f"{config.block_m} rows", choice(DECODE, config)
        (whole,) = attention_decode.requests(problem, config, gpu, split=False)
        part, merge = attention_decode.requests(problem, config, gpu)
        found.append(Compile(attention_decode.OP, whole, config, tile, vetoed))
        found.append(Compile(attention_decode.OP, part, config, f"{tile}, keys divided", vetoed))
        found.append(Compile("attention_merge", merge, None, tile, vetoed))
    if tokens > attention_decode.MAX_QUERIES:
        config = tuned[1] or attention_extend.default(problem, gpu)
        (request,) = attention_extend.requests(problem, config, gpu)
        found.append(Compile(attention_extend.OP, request, config, choice=choice(EXTEND, config)))
    chosen = {compile.config for compile in found if compile.config is not None}
    why = "default" if chosen.isdisjoint(tuned) else "measured" if chosen <= set(tuned) else "partly measured"
    return Made("paged", why + instead, tuple(found))


def plan(
    query_start: np.ndarray,
    context_tokens: np.ndarray,
    page_table: torch.Tensor,
    *,
    tree: torch.Tensor | None = None,
    context_bound: int | None = None,
) -> Plan:
    """The arrays on the device of `page_table` [requests, max_pages] int32 or int64, whose rows are padded
    with 0. `tree` [requests, queries, queries] bool: which of its request's own tokens a token sees (see
    kernels/_attention.py `pack_tree`). `context_bound`: the longest context that the plan will be refilled
    with; by default those that it has."""
    from firebox.kernels._attention import Paged, pack_tree
    from firebox.kernels.attention_decode import MAX_QUERIES

    device, counts = page_table.device, np.diff(query_start)
    bits = (None, None) if tree is None else pack_tree(tree.to(device), query_start)
    pages = page_table.to(torch.int32).contiguous()
    paged = Paged(pages, _int32(context_tokens, device), _int32(query_start, device), *bits)
    few = (counts > 0) & (counts <= MAX_QUERIES)
    contexts = np.where(few, context_bound or context_tokens, 0)
    longest, mean = (int(contexts.max()), int(contexts.mean())) if few.any() else (0, 0)
    return Plan(paged, query_start, context_tokens, int(counts[few].max(initial=0)), (longest, mean))


def refill(plan: Plan, context_tokens: np.ndarray, page_table: torch.Tensor) -> None:
    """Writes another step's contexts and pages over those of a plan made with `context_bound`, for a graph
    that is about to be replayed. Each request has as many queries as before; a request that is padding has a
    context of as many tokens, in page 0. Fewer columns of `page_table` may be given than there are."""
    longest = max(context_tokens, default=0)
    assert longest <= plan.decode_contexts[0], (longest, plan.decode_contexts)
    plan.paged.context_tokens.copy_(torch.from_numpy(context_tokens.astype(np.int32)))
    plan.paged.page_table[:, : page_table.shape[1]].copy_(page_table)


def run(
    q: torch.Tensor,
    layer_cache: LayerCache,
    plan: Plan,
    scale: float,
    *,
    window_tokens: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See attention.base.Backend.run."""
    problem = _problem(q, layer_cache, plan, window_tokens, sinks)
    gpu, tokens = gpu_of(q.device), q.shape[0]
    out = q.new_empty(*q.shape[:2], problem.value_dim)
    step = Attended(
        q.contiguous(), layer_cache.k, layer_cache.v, layer_cache.scales, plan, scale, out, problem, gpu,
        window_tokens or 0, sinks,
    )  # fmt: skip
    if plan.decode_queries:
        decode(step, decode_config(problem, gpu, plan.decode_queries, tokens))
    extend(step, extend_config(problem, gpu, tokens))
    return out


@dataclass(frozen=True)
class Attended:
    """One layer's attention in a step: what attention.base.Backend.run is given. `out` [tokens, heads,
    value_dim]; `window_tokens` 0: no window."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    scales: tuple[float, float]
    plan: Plan
    scale: float
    out: torch.Tensor
    problem: Problem
    gpu: Gpu
    window_tokens: int
    sinks: torch.Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        """What both kernels take besides."""
        options = {"problem": self.problem, "window_tokens": self.window_tokens, "sinks": self.sinks}
        return options | {"scales": self.scales}


def decode(step: Attended, config: Config) -> None:
    """Writes the rows of `out` of the requests with few queries."""
    from firebox.kernels import attention_decode
    from firebox.kernels.launch import OBSERVERS, observe

    plan = step.plan
    load = (plan.paged.requests, plan.decode_queries, plan.decode_contexts)
    divided = splits(step.problem, step.gpu, config, *load, step.window_tokens)
    if OBSERVERS:
        observe(*attention_decode.requests(step.problem, config, step.gpu, split=divided > 1))
    attention_decode.attend(
        step.q, step.k_cache, step.v_cache, plan.paged, step.scale, step.out, config=config,
        max_queries=plan.decode_queries, splits=divided, pdl=attention_decode.depends(step.gpu),
        **step.options,
    )  # fmt: skip


def extend(step: Attended, config: Config) -> None:
    """Writes the rows of `out` of the requests with many queries; launches nothing if there are none."""
    from firebox.kernels import attention_extend
    from firebox.kernels.launch import OBSERVERS, observe

    tiles = _tiles(step.plan, step.problem.group, config.block_m)
    if not tiles.shape[1]:
        return
    if OBSERVERS:
        observe(*attention_extend.requests(step.problem, config, step.gpu))
    attention_extend.attend(
        step.q, step.k_cache, step.v_cache, step.plan.paged, tiles, step.scale, step.out, config=config,
        **step.options,
    )  # fmt: skip


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a tensor's device."""
    gpu = probe_gpu(device.index or 0) if device.type == "cuda" else None
    assert gpu is not None, f"{device} is no NVIDIA GPU"
    return gpu


def _problem(
    q: torch.Tensor,
    layer_cache: LayerCache,
    plan: Plan,
    window_tokens: int | None,
    sinks: torch.Tensor | None,
) -> Problem:
    from firebox.kernels._attention import Problem

    _, page_tokens, kv_heads, head_dim = layer_cache.k.shape
    return Problem(
        q.shape[1],
        kv_heads,
        head_dim,
        layer_cache.v.shape[-1],
        page_tokens,
        q.dtype,
        layer_cache.k.dtype,
        window=window_tokens is not None,
        sinks=None if sinks is None else sinks.dtype,
        tree=plan.paged.tree_bits is not None,
    )


def _tiles(plan: Plan, group: int, block_m: int) -> torch.Tensor:
    from firebox.kernels.attention_decode import MAX_QUERIES
    from firebox.kernels.attention_extend import list_tiles

    key = (group, block_m)
    if key not in plan.tiles:
        tiles = list_tiles(plan.query_start, plan.context_tokens, group, block_m, more_than=MAX_QUERIES)
        plan.tiles[key] = torch.from_numpy(tiles).to(plan.paged.page_table.device)
    return plan.tiles[key]


def _int32(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int32)).to(device)
