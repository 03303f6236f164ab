"""Attention of many queries per request over paged keys: prefill, whole or in chunks, behind a prefix or not;
the chunk's own keys are in the cache already.

    q [tokens, heads, head_dim]                            bf16, fp16 or fp32
    k_cache, v_cache [pages, page_tokens, kv_heads, dim]   bf16, fp16, fp32 or fp8 (e4m3)
    out [tokens, heads, value_dim]                         as q

The formula, the masks and the rounding are in _attention.py. A tile is block_m rows (queries times the heads
of a group) of one request and key head; the step's tiles are listed on the host, those with most keys first,
so that the last ones to run are short. A tile walks over the keys that its queries see: first, without a
mask, those that all of them see, then the rest. A request's result does not depend on the others of its step.

Measured: H200, 2026-11-21, docs/log/2026-11-21-gpu-kernels.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels._attention import (
    FP8,
    LOG2E,
    NOT_ALIGNED,
    NOT_SPECIALIZED,
    TREE_QUERIES,
    Config,
    Paged,
    Problem,
    attend_block,
    check,
    constants,
    declined,
    load_queries,
    reach,
    signature,
    store_output,
)
from firebox.kernels._attention_cases import EXTEND_CASES, Case, attention, make
from firebox.kernels.compile import PINNED_OPTIONS, CompileRequest, limit_bytes

# ---- 1. the problem

OP = "attention_extend"


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs, the head sizes of the supported models."""
    return declined(problem, gpu)


@functools.cache
def default(problem: Problem, gpu: Gpu) -> Config:
    """The configuration without measurements. Operands of mma come through registers, and 255 of them hold
    no more than these tiles; wgmma reads shared memory."""
    wgmma = "wgmma" in gpu.facts
    if problem.dot_dtype == torch.float32:
        return Config(16, 16, 4, 1)
    if problem.latent:
        roomy = wgmma and limit_bytes(gpu) > 230_000 and problem.kv_dtype.itemsize > 1
        return Config(64, 64, 8, 2) if roomy else Config(32, 32, 8, 2)
    if problem.head_dim > 128:
        return Config(128, 32, 8, 3) if wgmma and limit_bytes(gpu) > 140_000 else Config(64, 32, 8, 3)
    if wgmma and problem.head_dim == 128 and problem.kv_dtype.itemsize == 2:
        return Config(128, 64, 8, 3, 128)  # two blocks a multiprocessor: 0.84 of the next one's time
    if wgmma:  # more keys at a time: fewer instructions a key for the sums that are scaled each time
        return Config(128, 128 if limit_bytes(gpu) > 170_000 else 64, 8, 3)
    if problem.kv_dtype == FP8:
        return Config(64, 64, 8, 3)  # conversion takes registers
    return Config(64, 64 if problem.head_dim == 64 and not problem.window else 32, 4, 3)


def search_space(problem: Problem, gpu: Gpu) -> list[Config]:
    """What is worth measuring. With 128 registers two blocks of 128 rows share a multiprocessor, and one
    computes its softmax while the other multiplies."""
    shared = [Config(128, block_n, 8, 3, 128) for block_n in (32, 64)] if problem.value_dim <= 128 else []
    return shared + [
        Config(block_m, block_n, num_warps, num_stages)
        for block_m, num_warps in ((32, 8), (64, 4), (64, 8), (128, 8))
        for block_n in (32, 64, 128)
        for num_stages in (3, 5)
        if block_m * problem.value_dim <= num_warps * 4096
    ]


# ---- 2. the device code


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_ALIGNED)
def extend(
    q, k_cache, v_cache, out, page_table, context_tokens, query_start, tile_requests, tile_rows, sinks,
    tree_bits, tree_depths, scale, v_scale, window_tokens, max_pages,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr, PAGE_TOKENS: tl.constexpr, WINDOW: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TREE_QUERIES: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_M rows of one request and key head over the keys that they see."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TAIL: tl.constexpr = HEAD_DIM - VALUE_DIM
    kv_head, tile = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    request = tl.load(tile_requests + tile)
    if request < 0:
        return
    first_row = tl.load(tile_rows + tile)
    first_token = tl.load(query_start + request)
    queries = tl.load(query_start + request + 1) - first_token
    context = tl.load(context_tokens + request)
    prefix = context - queries

    row = first_row + tl.arange(0, BLOCK_M)
    query, head = row // GROUP, kv_head * GROUP + row % GROUP
    valid = query < queries
    token = (first_token + query).to(tl.int64)
    last, positions, bits = reach(tree_bits, tree_depths, token, query, queries, prefix, TREE_QUERIES)
    first_position = prefix + first_row // GROUP
    end = tl.minimum(prefix + (first_row + BLOCK_M - 1) // GROUP + 1, context)
    seen_by_all = first_position + 1
    if tree_bits is not None:
        is_tree = queries <= TREE_QUERIES
        first_position = tl.where(is_tree, prefix, first_position)
        seen_by_all = tl.where(is_tree, prefix, seen_by_all)
        end = tl.where(is_tree, context, end)

    q_main = load_queries(q, token, head, valid, HEADS, HEAD_DIM, 0, VALUE_DIM, WIDTH, DOT)
    q_tail = q_main
    if TAIL > 0:
        q_tail = load_queries(q, token, head, valid, HEADS, HEAD_DIM, VALUE_DIM, TAIL, TAIL, DOT)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    pages = page_table + request.to(tl.int64) * max_pages
    k_cache += kv_head * HEAD_DIM
    v_cache += kv_head * HEAD_DIM
    if WINDOW:
        lowest = tl.maximum(first_position - window_tokens + 1, 0)
        begin = lowest // BLOCK_N * BLOCK_N
    else:
        lowest = 0
        begin = seen_by_all // BLOCK_N * BLOCK_N
        for start in range(0, begin, BLOCK_N):
            acc, top, total = attend_block(
                acc, top, total, q_main, q_tail, k_cache, v_cache, pages, start, lowest, end, scale,
                prefix, last, positions, bits, window_tokens, HEAD_DIM, VALUE_DIM, KV_HEADS, PAGE_TOKENS, DOT,
                BLOCK_N, WIDTH, False, WINDOW, tree_bits is not None,
            )  # fmt: skip
    for start in range(begin, end, BLOCK_N):
        acc, top, total = attend_block(
            acc, top, total, q_main, q_tail, k_cache, v_cache, pages, start, lowest, end, scale, prefix,
            last, positions, bits, window_tokens, HEAD_DIM, VALUE_DIM, KV_HEADS, PAGE_TOKENS, DOT, BLOCK_N,
            WIDTH, True, WINDOW, tree_bits is not None,
        )  # fmt: skip
    store_output(out, acc, top, total, token, head, valid, sinks, v_scale, LOG2E, HEADS, VALUE_DIM, WIDTH)


# ---- 3. the launcher


def list_tiles(
    query_start: np.ndarray, context_tokens: np.ndarray, group: int, block_m: int, more_than: int = 0
) -> np.ndarray:
    """[2, tiles] int32: of each tile its request and first row, most keys first, for the requests with more
    queries than `more_than`. On the host."""
    queries = np.diff(query_start)
    counts = np.where(queries > more_than, -(-queries * group // block_m), 0)
    requests = np.repeat(np.arange(len(counts)), counts)
    rows = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * block_m
    last_query = np.minimum((rows + block_m - 1) // group, queries[requests] - 1)
    keys = (context_tokens - queries)[requests] + last_query + 1
    order = np.argsort(-keys, kind="stable")
    return np.stack((requests[order], rows[order])).astype(np.int32)


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    paged: Paged,
    tiles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    *,
    problem: Problem,
    config: Config,
    window_tokens: int = 0,
    sinks: torch.Tensor | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Writes the rows of `out` that `tiles` [2, tiles] int32 covers (see `list_tiles`; request −1 is no
    tile), and returns it; other rows stay as they are. `scales`: of the cache's keys and values. `sinks`
    [heads]. One launch."""
    check(problem, q, k_cache, v_cache)
    assert scale > 0, f"the largest score must have the largest product, so scale is positive, not {scale}"
    assert tiles.is_contiguous() and tiles.dtype == torch.int32, (tiles.stride(), tiles.dtype)
    requests, rows = tiles
    extend[(problem.kv_heads * tiles.shape[1],)](
        q, k_cache, v_cache, out, paged.page_table, paged.context_tokens, paged.query_start, requests, rows,
        sinks, paged.tree_bits, paged.tree_depths, scale * scales[0] * LOG2E, scales[1], window_tokens,
        paged.page_table.stride(0), **_constants(problem, config), num_warps=config.num_warps,
        num_stages=config.num_stages, **config.limits, **PINNED_OPTIONS,
    )  # fmt: skip
    return out


def requests(problem: Problem, config: Config, gpu: Gpu) -> tuple[CompileRequest, ...]:
    """The launch that `attend` makes with this configuration."""
    types, absent = signature(problem, {"tile_requests": "*i32", "tile_rows": "*i32"})
    aligned = tuple(name for name, kind in types.items() if kind.startswith("*") and name not in NOT_ALIGNED)
    constexprs = _constants(problem, config) | absent
    return (
        CompileRequest(
            extend, types, constexprs, gpu, aligned, config.num_warps, config.num_stages,
            options=config.limits, declares=problem.declares,
        ),
    )  # fmt: skip


def _constants(problem: Problem, config: Config) -> dict[str, Any]:
    return constants(problem, config) | {"TREE_QUERIES": TREE_QUERIES, "LOG2E": LOG2E}


# ---- 4. the reference


def reference(problem: Problem, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The formula in float32."""
    return attention(problem, inputs)


# ---- 5. inputs, cases, tolerance: see _attention_cases.py

CASES = EXTEND_CASES


def inputs(case: Case, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """What `attend` and `reference` take."""
    return make(case, seed, device)
