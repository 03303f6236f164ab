"""Attention of a few queries per request over long paged contexts, the keys divided among blocks (split-KV).

    q [tokens, heads, head_dim]                            bf16, fp16 or fp32
    k_cache, v_cache [pages, page_tokens, kv_heads, dim]   bf16, fp16, fp32 or fp8 (e4m3)
    out [tokens, heads, value_dim]                         as q

The formula, the masks and the rounding are in _attention.py. Blocks of the grid: (rows of a key head, split,
request). A request's keys, less those that no query's window reaches, go to the splits in equal runs of whole
tiles, at least MIN_TILES each unless one takes all; what is over has nothing to do and ends. Where one split
takes all, it writes the output, and the second launch ends at once; else each leaves acc / total and log2 of
its sum of exp2, and the second launch adds them up, split after split, so that the result does not depend on
who came first. The sink takes part once, in the end.

A request's result depends on its own queries and keys and on `splits`, which the backend takes from the
batch: in another batch the same sum may be rounded otherwise.

Measured: H200, 2026-11-21, docs/log/2026-11-21-gpu-kernels.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

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
from firebox.kernels._attention_cases import DECODE_CASES, Case, attention, make
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import PINNED_OPTIONS, CompileRequest, limit_bytes
from firebox.kernels.launch import INTERPRETED

# ---- 1. the problem

OP = "attention_decode"
MAX_QUERIES = 16  # of a request; more are a matter for attention_extend
MAX_SPLITS = 256
MIN_TILES = 4  # a split of fewer costs more in the second launch than it saves in the first
# So do two splits of few tiles: the second launch takes 2 µs, a tile of 64 keys 0.5 µs (H200, a model's
# steps, 2026-11-22). A latent tile takes longer.
WHOLE_TILES = 8
TILE_KEYS = 64  # of such tiles; of wider ones fewer count
MERGE_COLUMNS, MERGE_SPLITS = 128, 32
_SHARED_LATENT = Config(16, 32, 8, 5, 128)  # two blocks a multiprocessor; without the limit it is one


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs, the head sizes of the supported models."""
    return declined(problem, gpu)


def block_rows(problem: Problem, gpu: Gpu, queries: int) -> int:
    """Rows of a block for up to `queries` queries a request: a power of two from 16, the least that a matrix
    instruction takes, to what the registers hold."""
    wide = 64 if "wgmma" in gpu.facts and limit_bytes(gpu) > 200_000 and problem.kv_dtype.itemsize > 1 else 32
    most = wide if problem.latent else 32 if problem.head_dim > 128 else 64
    return min(max(16, triton.next_power_of_2(problem.group * queries)), most)


@functools.cache
def default(problem: Problem, gpu: Gpu, queries: int) -> Config:
    """The configuration without measurements. A page lookup takes a stage of its own, so with 3 there is room
    for one tile, filled again when all of it has been used; with 5 for two, which is better where it does not
    keep a second block off the multiprocessor."""
    rows, wgmma = block_rows(problem, gpu, queries), "wgmma" in gpu.facts
    roomy = gpu.smem_per_sm_bytes > 200_000 and limit_bytes(gpu) > 200_000
    if problem.dot_dtype == torch.float32:
        return Config(16, 16, 4, 1)
    if problem.latent and rows == 16 and roomy:
        return Config(16, 64, 8, 5) if problem.kv_dtype == FP8 else _SHARED_LATENT
    if problem.latent:
        return {16: Config(16, 32, 8, 5), 32: Config(32, 32, 8, 2), 64: Config(64, 64, 8, 2)}[rows]
    num_stages = 5 if rows == 16 and roomy else 3
    if problem.head_dim > 128:
        return Config(rows, 32, 4 if rows == 16 else 8, num_stages)
    num_warps = 8 if problem.kv_dtype == FP8 and not wgmma else 4  # conversion takes registers
    return Config(rows, 64 if rows == 16 or wgmma else 32, num_warps, num_stages)


def search_space(problem: Problem, gpu: Gpu, queries: int) -> list[Config]:
    """What is worth measuring."""
    rows = block_rows(problem, gpu, queries)
    tiles = [
        Config(rows, block_n, num_warps, num_stages)
        for block_n in (32, 64, 128)
        for num_warps in (4, 8)
        for num_stages in (2, 3, 5)
        if block_n * problem.head_dim <= 64 * 576 and rows * problem.value_dim <= num_warps * 4096
    ]
    return [*tiles, _SHARED_LATENT] if problem.latent and rows == 16 else tiles


def places(problem: Problem, config: Config, gpu: Gpu) -> int:
    """Blocks that run at once, as far as they matter: two a multiprocessor keep enough loads in flight, but
    of most latent tiles, and of those whose keys and values fill more than half of it, there is room for
    one."""
    tile_bytes = config.block_n * (problem.head_dim + problem.value_dim) * problem.kv_dtype.itemsize
    alone = config.max_registers is None if problem.latent else 2 * tile_bytes > gpu.smem_per_sm_bytes
    return gpu.sms * (1 if alone else 2)


def min_tiles(problem: Problem, config: Config) -> int:
    """A split has at least so many tiles of keys."""
    return _counted(MIN_TILES, problem, config)


def whole_tiles(problem: Problem, config: Config) -> int:
    """Up to so many tiles of keys are one split."""
    return _counted(MIN_TILES if problem.latent else WHOLE_TILES, problem, config)


def _counted(tiles: int, problem: Problem, config: Config) -> int:
    return tiles if problem.latent else max(1, tiles // max(1, config.block_n // TILE_KEYS))


def split_count(
    programs: int,
    contexts: tuple[int, int],
    places: int,
    tile_tokens: int,
    whole: int = MIN_TILES,
    fewest: int = MIN_TILES,
) -> int:
    """Splits that fill the `places` of a GPU. `programs`: blocks a split; `contexts`: tokens of the longest
    request, and of all divided by the requests; `whole`: so many tiles are not divided; `fewest` tiles a
    split has. Where one request is longer than the others, it is divided as if there were just so many of its
    length as make up the sum."""
    longest, mean = max(contexts[0], 1), max(contexts[1], 1)
    alike = max(1.0, programs * mean / longest)
    most = min(-(-longest // (tile_tokens * fewest)), MAX_SPLITS) if longest > tile_tokens * whole else 1
    least = min(max(1, int(places // alike)), most)

    def share_busy(splits: int) -> float:  # of the places, over all waves; each split more costs a little
        blocks = alike * splits
        return blocks / (-(-blocks // places) * places) - 0.06 * (splits - least)

    return max(range(least, min(least + 4, most + 1)), key=share_busy)


# ---- 2. the device code


@triton.jit
def shares(
    queries, context, window_tokens, splits, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr,
    WHOLE_TILES: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The first key that a request's queries see, how many tiles of keys they see, and how many a split
    takes."""
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(context - queries - window_tokens + 1, 0)
    tiles = tl.cdiv(context, BLOCK_N) - lowest // BLOCK_N
    share = tl.maximum(tl.cdiv(tiles, splits), MIN_TILES)
    return lowest, tiles, tl.where(tiles <= WHOLE_TILES, WHOLE_TILES, share)


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_ALIGNED)
def decode(
    q, k_cache, v_cache, out, partial, partial_top, page_table, context_tokens, query_start, sinks, tree_bits,
    tree_depths, scale, v_scale, window_tokens, max_pages, max_queries, splits,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr, PAGE_TOKENS: tl.constexpr, WINDOW: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr,
    WHOLE_TILES: tl.constexpr, TREE_QUERIES: tl.constexpr, LOG2E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one request and key head over one split of its keys."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TAIL: tl.constexpr = HEAD_DIM - VALUE_DIM
    kv_head, first_row = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS * BLOCK_M
    split, request = tl.program_id(1), tl.program_id(2)
    first_token = tl.load(query_start + request)
    queries = tl.load(query_start + request + 1) - first_token
    context = tl.load(context_tokens + request)
    let_next_launch_begin(PDL)
    wait_for_launch_before(PDL)  # the step's integers were written long before; queries and keys were not
    if (queries > max_queries) | (first_row >= queries * GROUP):
        return
    lowest, tiles, share = shares(
        queries, context, window_tokens, splits, BLOCK_N, MIN_TILES, WHOLE_TILES, WINDOW
    )
    if split * share >= tiles:
        return
    begin = (lowest // BLOCK_N + split * share) * BLOCK_N
    end = tl.minimum(begin + share * BLOCK_N, context)

    row = first_row + tl.arange(0, BLOCK_M)
    query, head = row // GROUP, kv_head * GROUP + row % GROUP
    valid = query < queries
    token = (first_token + query).to(tl.int64)
    prefix = context - queries
    last, positions, bits = reach(tree_bits, tree_depths, token, query, queries, prefix, TREE_QUERIES)
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
    for start in range(begin, end, BLOCK_N):
        acc, top, total = attend_block(
            acc, top, total, q_main, q_tail, k_cache, v_cache, pages, start, lowest, end, scale, prefix,
            last, positions, bits, window_tokens, HEAD_DIM, VALUE_DIM, KV_HEADS, PAGE_TOKENS, DOT, BLOCK_N,
            WIDTH, True, WINDOW, tree_bits is not None,
        )  # fmt: skip

    if partial is not None:  # noqa: SIM102 (decided when it is compiled, the next one when it runs)
        if share < tiles:
            columns = tl.arange(0, WIDTH)
            at = ((request.to(tl.int64) * max_queries + query) * HEADS + head) * splits + split  # [BLOCK_M]
            mask = valid[:, None] & (columns < VALUE_DIM)[None, :]
            # a row that sees none of these keys leaves zeros, and -inf for its sum
            average = acc / tl.where(total > 0.0, total, 1.0)[:, None]
            tl.store(partial + at[:, None] * VALUE_DIM + columns[None, :], average, mask=mask)
            tl.store(partial_top + at, top + tl.log2(total), mask=valid)
            return
    store_output(out, acc, top, total, token, head, valid, sinks, v_scale, LOG2E, HEADS, VALUE_DIM, WIDTH)


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_ALIGNED)
def merge(
    partial, partial_top, out, context_tokens, query_start, sinks, v_scale, window_tokens, max_queries,
    splits, HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr, WHOLE_TILES: tl.constexpr, MAX_SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, LOG2E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one query and head, from all splits."""
    request, query = tl.program_id(0) // max_queries, tl.program_id(0) % max_queries
    head, columns = tl.program_id(1), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    first_token = tl.load(query_start + request)
    queries = tl.load(query_start + request + 1) - first_token
    context = tl.load(context_tokens + request)
    let_next_launch_begin(PDL)
    wait_for_launch_before(PDL)
    if (queries > max_queries) | (query >= queries):
        return
    _, tiles, share = shares(queries, context, window_tokens, splits, BLOCK_N, MIN_TILES, WHOLE_TILES, WINDOW)
    if share >= tiles:
        return
    used = tl.cdiv(tiles, share)
    at = ((request.to(tl.int64) * max_queries + query) * HEADS + head) * splits
    which = tl.arange(0, MAX_SPLITS)
    tops = tl.load(partial_top + at + which, mask=which < used, other=float("-inf"))
    peak = tl.max(tops, 0)
    total = 0.0
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
        total = tl.exp2(sink - peak)
    total += tl.sum(tl.exp2(tops - peak), 0)
    inside = columns < VALUE_DIM
    acc = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, used, CHUNK):
        splits_here = start + tl.arange(0, CHUNK)
        there = splits_here < used
        weights = tl.exp2(tl.load(partial_top + at + splits_here, mask=there, other=float("-inf")) - peak)
        tile = (at + splits_here)[:, None] * VALUE_DIM + columns[None, :]  # [CHUNK, COLUMNS]
        averages = tl.load(partial + tile, mask=there[:, None] & inside[None, :], other=0.0)
        acc += tl.sum(weights[:, None] * averages, 0)
    token = (first_token + query).to(tl.int64)
    done = acc * (v_scale / total)
    tl.store(out + (token * HEADS + head) * VALUE_DIM + columns, done.to(out.dtype.element_ty), mask=inside)


# ---- 3. the launcher


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    paged: Paged,
    scale: float,
    out: torch.Tensor,
    *,
    problem: Problem,
    config: Config,
    max_queries: int,
    splits: int,
    window_tokens: int = 0,
    sinks: torch.Tensor | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    pdl: bool = False,
) -> torch.Tensor:
    """Writes the rows of `out` of all requests with 1 … `max_queries` queries, and returns it; other rows
    stay as they are. `pdl`: the launches may begin before the one before them has ended, which has not
    written any of `paged`. `scales`: of the cache's keys and values. `sinks` [heads]. One launch, two with
    `splits` above 1; the second needs workspace of max_queries · splits rows of float32 per request and
    head."""
    check(problem, q, k_cache, v_cache)
    assert 1 <= max_queries <= MAX_QUERIES and 1 <= splits <= MAX_SPLITS, (max_queries, splits)
    assert scale > 0, f"the largest score must have the largest product, so scale is positive, not {scale}"
    shape = (paged.requests, max_queries, problem.heads, splits)
    partial = q.new_empty((*shape, problem.value_dim), dtype=torch.float32) if splits > 1 else None
    partial_top = q.new_empty(shape, dtype=torch.float32) if splits > 1 else None
    row_blocks = -(-problem.group * max_queries // config.block_m)
    decode[problem.kv_heads * row_blocks, splits, paged.requests](
        q, k_cache, v_cache, out, partial, partial_top, paged.page_table, paged.context_tokens,
        paged.query_start, sinks, paged.tree_bits, paged.tree_depths, scale * scales[0] * LOG2E, scales[1],
        window_tokens, paged.page_table.stride(0), max_queries, splits, **_constants(problem, config, pdl),
        num_warps=config.num_warps, num_stages=config.num_stages, **config.limits, **PINNED_OPTIONS,
        **_launch_options(pdl),
    )  # fmt: skip
    if splits > 1:
        column_blocks = -(-problem.value_dim // MERGE_COLUMNS)
        merge[paged.requests * max_queries, problem.heads, column_blocks](
            partial, partial_top, out, paged.context_tokens, paged.query_start, sinks, scales[1],
            window_tokens, max_queries, splits, **_merge_constants(problem, config, pdl),
            num_warps=4, num_stages=1, **PINNED_OPTIONS, **_launch_options(pdl),
        )  # fmt: skip
    return out


def requests(problem: Problem, config: Config, gpu: Gpu, *, split: bool = True) -> tuple[CompileRequest, ...]:
    """The launches that `attend` makes with this configuration; not `split`: with `splits` 1."""
    partials = {"partial": "*fp32", "partial_top": "*fp32"}
    pdl = depends(gpu)
    types, absent = signature(problem, {"max_queries": "i32", "splits": "i32"} | (partials if split else {}))
    if not split:
        absent = absent | dict.fromkeys(partials)
    first = CompileRequest(
        decode, types, _constants(problem, config, pdl) | absent, gpu, _aligned(types), config.num_warps,
        config.num_stages, options={**config.limits, **_launch_options(pdl)}, declares=problem.declares,
    )  # fmt: skip
    if not split:
        return (first,)
    constexprs = _merge_constants(problem, config, pdl) | {k: v for k, v in absent.items() if k == "sinks"}
    taken = {name: kind for name, kind in types.items() if name in merge.arg_names}
    options = _launch_options(pdl)
    return first, CompileRequest(merge, taken, constexprs, gpu, _aligned(taken), 4, 1, options)


def depends(gpu: Gpu) -> bool:
    """Do launches on `gpu` begin before the one before them has ended?"""
    return "pdl" in gpu.facts and not INTERPRETED


def _launch_options(pdl: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if pdl else {}


def _constants(problem: Problem, config: Config, pdl: bool) -> dict[str, Any]:
    own = {
        "MIN_TILES": min_tiles(problem, config),
        "WHOLE_TILES": whole_tiles(problem, config),
        "TREE_QUERIES": TREE_QUERIES,
        "LOG2E": LOG2E,
        "PDL": pdl,
    }
    return constants(problem, config) | own


def _merge_constants(problem: Problem, config: Config, pdl: bool) -> dict[str, Any]:
    own = {"MAX_SPLITS": MAX_SPLITS, "COLUMNS": MERGE_COLUMNS, "CHUNK": MERGE_SPLITS}
    all_of_them = _constants(problem, config, pdl) | own
    return {name: value for name, value in all_of_them.items() if name in merge.arg_names}


def _aligned(types: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name, kind in types.items() if kind.startswith("*") and name not in NOT_ALIGNED)


# ---- 4. the reference


def reference(problem: Problem, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The formula in float32."""
    return attention(problem, inputs)


# ---- 5. inputs, cases, tolerance: see _attention_cases.py

CASES = DECODE_CASES


def inputs(case: Case, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """What `attend` and `reference` take."""
    return make(case, seed, device)
