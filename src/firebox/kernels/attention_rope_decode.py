"""Decode attention of steps in which every request has one query, from the projections on: norms of queries
and keys, rotary position embedding, the write into the paged cache and attention, in one launch.

    what kernels/rope_write.py writes, then what kernels/attention_decode.py makes of it

qkv [requests, columns] as rope_write.py reads it; k_cache, v_cache, the page table and out as
attention_decode.py does. Blocks of the grid: (key head, split, request). Keys of earlier steps are divided
among the splits as there, and merged by the same second launch; the own key and value, which the first split
makes and writes, begin its softmax. Each split rotates the queries for itself.

What one launch saves at few requests is waiting: the keys and values of earlier steps, of which a block's
first tile is read while the projections still run, need nothing of this step. They must have been written
before the launch before this one began: that one waits before it lets this one begin (kernels/_pdl.py).

Rounding is that of the two launches; the order of sums in a norm and in the own score may differ.

Source: own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _attention_cases, _kv_write, attention_decode, rope_write
from firebox.kernels._attention import (
    LOG2E,
    NOT_ALIGNED,
    Config,
    Paged,
    check,
    constants,
    load_rows,
    locate,
    signature,
    softmax_step,
    store_output,
    to_dot,
)
from firebox.kernels._attention import Problem as PagedProblem
from firebox.kernels._experts import DTYPES, POINTER_NAMES
from firebox.kernels._kv_write import FP8, encoded
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.attention_decode import MERGE_COLUMNS, depends, min_tiles, shares, whole_tiles
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher
from firebox.kernels.rope_write import normed

# ---- 1. the problem

OP = "attention_rope_decode"
MERGE = "attention_merge"


@dataclass(frozen=True)
class Problem:
    """One layer, as each of the two kernels sees it."""

    rope: rope_write.Problem
    paged: PagedProblem


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """What both kernels accept, where a block holds a key head's queries and knows all that a norm needs."""
    rope, paged = problem.rope, problem.paged
    if paged.latent or paged.tree:
        return "rotates whole heads of requests with one query"
    if rope.qk_norm == "row":
        return "norms each head alone"
    rows = attention_decode.block_rows(paged, gpu, 1)
    if paged.group > rows:
        return f"holds {rows} query heads of a key head, not {paged.group}"
    return rope_write.accepts(rope, gpu) or attention_decode.accepts(paged, gpu)


def default(problem: Problem, gpu: Gpu) -> Config:
    """That of attention_decode.py; where a tile is read ahead, one stage less."""
    return attention_decode.default(problem.paged, gpu, 1)


def search_space(problem: Problem, gpu: Gpu) -> list[Config]:
    """What is worth measuring: attention_decode.py's, and tiles that hold all of a short context."""
    paged = problem.paged
    rows = attention_decode.block_rows(paged, gpu, 1)
    return [
        Config(rows, block_n, num_warps, num_stages)
        for block_n in (32, 64, 128, 256)
        for num_warps in (2, 4, 8, 16)
        for num_stages in (2, 3, 5)
        if 2048 <= block_n * paged.head_dim // num_warps <= 8192
    ]


# ---- 2. the device code


@triton.jit
def _turned(
    base, weight, turn_cos, turn_sin, head, valid, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr, HALF: tl.constexpr, gain, other_gain, NORM: tl.constexpr, EPS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Heads `head` [rows] of a token, normed, rotated and rounded: [rows, WIDTH] in DTYPE, zeros where they
    are not `valid`. The first is at `base`, the next ones STRIDE behind each other."""
    column = tl.arange(0, WIDTH)[None, :]
    at = base + head[:, None] * STRIDE
    own = tl.load(at + column, mask=valid[:, None] & (column < HEAD_DIM), other=0.0).to(tl.float32)
    partner = tl.load(
        at + _partner(column, HALF), mask=valid[:, None] & (column < 2 * HALF), other=0.0
    ).to(tl.float32)  # fmt: skip
    squares = tl.sum(own * own, axis=1, keep_dims=True)
    own = normed(own, gain, squares, NORM, HEAD_DIM, EPS, DTYPE)
    partner = normed(partner, other_gain, squares, NORM, HEAD_DIM, EPS, DTYPE)
    sign = tl.where(column < HALF, -1.0, 1.0)
    turned = own * turn_cos + sign * (partner * turn_sin)
    return tl.where(column < 2 * HALF, turned, own).to(DTYPE)


@triton.jit
def _partner(column, HALF: tl.constexpr):
    """The dimension that each one of the first 2 · HALF is rotated with."""
    return tl.where(column < HALF, column + HALF, column - HALF)


@triton.jit
def _gains(weight, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr):
    """A norm's weights of each dimension and of its partner, [1, WIDTH] each; 1 without a norm."""
    column = tl.arange(0, WIDTH)[None, :]
    gain = 1.0
    other = 1.0
    if NORM != "":
        gain = tl.load(weight + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
        at = weight + _partner(column, HALF)
        other = tl.load(at, mask=column < 2 * HALF, other=0.0).to(tl.float32)
    return gain, other


@triton.jit
def rotate_and_attend(
    qkv, q_weight, k_weight, cos, sin, positions, token_slots, scales, k_cache, v_cache, out, partial,
    partial_top, page_table, context_tokens, sinks, scale, v_scale, window_tokens, max_pages, splits,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    HALF: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, WINDOW: tl.constexpr, DTYPE: tl.constexpr, KV_TYPE: tl.constexpr,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr,
    WHOLE_TILES: tl.constexpr, LOG2E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The query heads of one request and key head over one split of its keys."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    Q_STRIDE: tl.constexpr = 2 * HEAD_DIM if GATED else HEAD_DIM
    ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    kv_head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    context = tl.load(context_tokens + request)
    position = tl.load(positions + request)
    slot = tl.load(token_slots + request)
    lowest, tiles, share = shares(1, context, window_tokens, splits, BLOCK_N, MIN_TILES, WHOLE_TILES, WINDOW)
    busy = split * share < tiles
    begin = tl.where(busy, (lowest // BLOCK_N + split * share) * BLOCK_N, 0)
    end = tl.where(busy, tl.minimum(begin + share * BLOCK_N, context - 1), 0)  # the last key is the own one

    # what earlier launches have written: the first tile of old keys, and what rotates the new one
    pages = page_table + request * max_pages
    k_cache += kv_head * HEAD_DIM
    v_cache += kv_head * HEAD_DIM
    at = begin + tl.arange(0, BLOCK_N)
    inside = (at >= lowest) & (at < end)
    base, offsets = locate(pages, begin, inside, BLOCK_N, ROW, PAGE_TOKENS)
    k = load_rows(k_cache + base, offsets, inside, HEAD_DIM, WIDTH, DOT, True)
    v = load_rows(v_cache + base, offsets, inside, HEAD_DIM, WIDTH, DOT, True)
    column = tl.arange(0, WIDTH)[None, :]
    turns = position * HALF + column % HALF
    turn_cos = tl.load(cos + turns, mask=column < 2 * HALF, other=1.0)
    turn_sin = tl.load(sin + turns, mask=column < 2 * HALF, other=0.0)
    q_gain, q_other = _gains(q_weight, HEAD_DIM, WIDTH, HALF, NORM)
    k_gain, k_other = _gains(k_weight, HEAD_DIM, WIDTH, HALF, NORM)
    let_next_launch_begin(PDL)
    wait_for_launch_before(PDL)
    if not busy:
        return

    row = tl.arange(0, BLOCK_M)
    head, valid = kv_head * GROUP + row, row < GROUP
    queries = qkv + request * (HEADS * Q_STRIDE + 2 * ROW)
    keys = queries + HEADS * Q_STRIDE
    q = to_dot(
        _turned(
            queries, q_weight, turn_cos, turn_sin, head, valid, Q_STRIDE, HEAD_DIM, WIDTH, HALF, q_gain,
            q_other, NORM, EPS, DTYPE,
        ),
        DOT,
    )  # fmt: skip

    # the own key and value: the first split's
    first = split == 0
    one = kv_head + tl.arange(0, 1)
    own_key = _turned(
        keys, k_weight, turn_cos, turn_sin, one, one >= 0, HEAD_DIM, HEAD_DIM, WIDTH, HALF, k_gain, k_other,
        NORM, EPS, DTYPE,
    ).to(tl.float32)  # fmt: skip
    in_head = column < HEAD_DIM
    own_value = tl.load(keys + ROW + kv_head * HEAD_DIM + column, mask=in_head, other=0.0).to(tl.float32)
    k_scale = None if scales is None else tl.load(scales)
    v_scale_of_code = None if scales is None else tl.load(scales + 1)
    own_key = encoded(own_key, k_scale, KV_TYPE)
    own_value = encoded(own_value, v_scale_of_code, KV_TYPE)
    written = tl.where(first, HEAD_DIM, 0)
    tl.store(k_cache + slot * ROW + column, own_key, mask=column < written)
    tl.store(v_cache + slot * ROW + column, own_value, mask=column < written)
    own_score = tl.sum(q.to(tl.float32) * to_dot(own_key, DOT).to(tl.float32), 1) * scale
    top = tl.where(first, own_score, float("-inf"))
    total = tl.where(first, tl.full((BLOCK_M,), 1.0, tl.float32), 0.0)
    acc = tl.where(first, to_dot(own_value, DOT).to(tl.float32), tl.zeros((BLOCK_M, WIDTH), tl.float32))

    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(inside[None, :], scores, float("-inf"))
    acc, top, total = softmax_step(acc, top, total, scores, v, scale, DOT, True)
    for start in range(begin + BLOCK_N, end, BLOCK_N):
        inside = start + tl.arange(0, BLOCK_N) < end
        base, offsets = locate(pages, start, inside, BLOCK_N, ROW, PAGE_TOKENS)
        k = load_rows(k_cache + base, offsets, inside, HEAD_DIM, WIDTH, DOT, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(inside[None, :], scores, float("-inf"))
        v = load_rows(v_cache + base, offsets, inside, HEAD_DIM, WIDTH, DOT, True)
        acc, top, total = softmax_step(acc, top, total, scores, v, scale, DOT, True)

    if partial is not None:  # noqa: SIM102 (decided when it is compiled, the next one when it runs)
        if share < tiles:
            place = (request * HEADS + head) * splits + split  # [BLOCK_M]
            # a row that sees none of these keys leaves zeros, and -inf for its sum
            average = acc / tl.where(total > 0.0, total, 1.0)[:, None]
            tl.store(partial + place[:, None] * HEAD_DIM + column, average, mask=valid[:, None] & in_head)
            tl.store(partial_top + place, top + tl.log2(total), mask=valid)
            return
    store_output(
        out, acc, top, total, tl.full((BLOCK_M,), 0, tl.int64) + request, head, valid, sinks, v_scale, LOG2E,
        HEADS, HEAD_DIM, WIDTH,
    )  # fmt: skip


# ---- 3. the launch


def requests(problem: Problem, config: Config, gpu: Gpu, *, split: bool = True) -> dict[str, CompileRequest]:
    """The launches of a step by name; not `split`: with one split."""
    rope, paged = problem.rope, problem.paged
    pdl, partials = depends(gpu), {"partial": "*fp32", "partial_top": "*fp32"}
    types, absent = signature(paged, {"splits": "i32"} | (partials if split else {}))
    for name in ("q", "query_start"):
        types.pop(name)
    absent = {name: None for name in absent if name not in ("tree_bits", "tree_depths")}
    further, missing = _kv_write.types(rope.kv_dtype)
    projected = ("qkv", "q_weight", "k_weight") if rope.qk_norm else ("qkv",)
    types |= further | dict.fromkeys(projected, f"*{POINTER_NAMES[rope.dtype]}")
    absent |= missing | ({} if rope.qk_norm else dict.fromkeys(("q_weight", "k_weight")))
    absent |= {} if split else dict.fromkeys(partials)
    own = {
        "HALF": rope.rotary_dim // 2,
        "GATED": rope.gated,
        "NORM": rope.qk_norm,
        "EPS": rope.eps,
        "DTYPE": DTYPES[rope.dtype],
        "KV_TYPE": tl.float8e4nv if rope.kv_dtype == FP8 else DTYPES[rope.kv_dtype],
        "MIN_TILES": min_tiles(paged, config),
        "WHOLE_TILES": whole_tiles(paged, config),
        "LOG2E": LOG2E,
        "PDL": pdl,
    }
    shape = {name: value for name, value in constants(paged, config).items() if name != "VALUE_DIM"}
    found = {
        OP: CompileRequest(
            rotate_and_attend,
            types,
            shape | own | absent,
            gpu,
            tuple(name for name in _kv_write.pointers(types) if name not in NOT_ALIGNED),
            config.num_warps,
            config.num_stages,
            options={**config.limits, **({"launch_pdl": True} if pdl else {})},
            declares=paged.declares,
        )
    }
    if split:
        found[MERGE] = attention_decode.requests(paged, config, gpu)[1]
    return found


def run(
    launchers: dict[str, Launcher],
    problem: Problem,
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    paged: Paged,
    scale: float,
    out: torch.Tensor,
    *,
    splits: int = 1,
    window_tokens: int = 0,
    sinks: torch.Tensor | None = None,
    cache_scales: tuple[float, float] = (1.0, 1.0),
    **others: torch.Tensor,
) -> torch.Tensor:
    """Writes `out` [requests, heads, head_dim] and returns it, and the tokens' rows of the caches. `others`:
    cos, sin, positions, token_slots, with a norm q_weight and k_weight, for an FP8 cache scales, as
    rope_write.run takes them; `cache_scales`: the same two numbers on the host. `launchers`: of `requests`,
    made with a `split` where `splits` is above 1. `sinks` [heads]."""
    p, q_shape = problem.paged, (paged.requests, problem.paged.heads, problem.paged.head_dim)
    check(p, out, k_cache, v_cache)
    assert qkv.is_contiguous() and qkv.shape == (paged.requests, problem.rope.columns), qkv.shape
    assert scale > 0, f"the largest score must have the largest product, so scale is positive, not {scale}"
    assert out.shape == q_shape and 1 <= splits <= attention_decode.MAX_SPLITS, (out.shape, splits)
    rest: dict[str, Any] = {"out": out, "v_scale": cache_scales[1], "window_tokens": window_tokens}
    rest |= {"context_tokens": paged.context_tokens, "splits": splits}
    rest |= {} if sinks is None else {"sinks": sinks}
    if splits > 1:
        shape = (*q_shape[:2], splits)
        rest["partial"] = out.new_empty((*shape, p.head_dim), dtype=torch.float32)
        rest["partial_top"] = out.new_empty(shape, dtype=torch.float32)
    launchers[OP](
        (p.kv_heads, splits, paged.requests), qkv=qkv, k_cache=k_cache, v_cache=v_cache,
        page_table=paged.page_table, scale=scale * cache_scales[0] * LOG2E,
        max_pages=paged.page_table.stride(0), **rest, **others,
    )  # fmt: skip
    if splits > 1:
        columns = -(-p.value_dim // MERGE_COLUMNS)
        grid = (paged.requests, p.heads, columns)
        launchers[MERGE](grid, query_start=paged.query_start, max_queries=1, **rest)
    return out


# ---- 4. the reference


def rotated(problem: Problem, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, and the own keys and values before they are stored, as rope_write.reference has them."""
    names = ("qkv", "cos", "sin", "positions", "q_weight", "k_weight")
    return rope_write.reference(problem.rope, **{name: inputs[name] for name in names if name in inputs})


def attended(problem: Problem, inputs: dict[str, Any], q: torch.Tensor) -> torch.Tensor:
    """The formula in float32 over the caches as they are."""
    return _attention_cases.attention(problem.paged, {**inputs, "q": q})


def reference(problem: Problem, inputs: dict[str, Any]) -> torch.Tensor:
    """All of it; writes into the caches of `inputs`."""
    q, k, v = rotated(problem, inputs)
    for cache, rows, scale in zip(("k_cache", "v_cache"), (k, v), inputs["scales"], strict=True):
        _kv_write.put(inputs[cache], inputs["token_slots"], rows, scale)
    return attended(problem, inputs, q)


def given(problem: Problem, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What `run` takes as `others`."""
    found = {name: inputs[name] for name in ("cos", "sin", "positions", "token_slots")}
    if problem.rope.qk_norm:
        found |= {name: inputs[name] for name in ("q_weight", "k_weight")}
    return found | ({"scales": inputs["kv_scales"]} if problem.rope.kv_dtype == FP8 else {})


# ---- 5. cases and inputs

NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True)
class Case:
    """A layer and a step: the tokens of each request's context, its own one included."""

    problem: Problem
    contexts: tuple[int, ...]
    window_tokens: int = 0
    splits: int = 1

    def of(self, dtype: torch.dtype, kv_dtype: torch.dtype) -> Case:
        """The same in other types."""
        rope = replace(self.problem.rope, dtype=NAMES[dtype], kv_dtype=NAMES[kv_dtype])
        return replace(self, problem=Problem(rope, self._attention.of(dtype, kv_dtype).problem))

    @property
    def _attention(self) -> _attention_cases.Case:
        requests = tuple((1, context) for context in self.contexts)
        return _attention_cases.Case(self.problem.paged, requests, self.window_tokens, self.splits)

    @property
    def tolerance(self) -> float:
        """That of attention; own keys are rounded twice more."""
        return 2 * self._attention.tolerance


def _case(rope: rope_write.Problem, page_tokens: int, *contexts: int, **rest: Any) -> Case:
    """`rest`: window_tokens, splits, and sinks."""
    sinks = torch.bfloat16 if rest.pop("sinks", False) else None
    heads = (rope.heads, rope.kv_heads, rope.head_dim, rope.head_dim)
    window = rest.get("window_tokens", 0) > 0
    paged = PagedProblem(*heads, page_tokens, window=window, sinks=sinks)
    return Case(Problem(rope, paged), contexts, **rest)


CASES = (
    _case(rope_write.Problem(8, 2, 128, 128, "head"), 64, 1, 2, 64, 65, 66, 300),
    _case(rope_write.Problem(8, 1, 64, 64), 16, 1500, 7, 1, 513, splits=3, sinks=True),
    _case(rope_write.Problem(24, 2, 128, 64, "head"), 64, 130, 1),
    _case(rope_write.Problem(16, 1, 64, 64), 16, 200, 3, 64, 129, window_tokens=128, splits=2, sinks=True),
    _case(rope_write.Problem(2, 2, 64, 32), 4, 37, 1, window_tokens=1),
    _case(rope_write.Problem(8, 1, 256, 64, "head", gated=True), 32, 600, 33, splits=2),
    _case(rope_write.Problem(6, 2, 192, 128, gated=True), 16, 35, 1),
)


def inputs(case: Case, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """What `run` and `reference` take. The cache's rows of the step's own tokens are NaN until one of these
    writes them."""
    problem, rope = case.problem, case.problem.rope
    found = _attention_cases.make(case._attention, seed, device)
    generator = torch.Generator(device).manual_seed(seed)
    kind = {"device": device, "dtype": problem.paged.dtype}
    found |= rope_write.inputs(rope, len(case.contexts), generator, **kind)
    found["qkv"] /= 3  # such scores that more than one key matters
    at, page = torch.tensor(case.contexts, device=device) - 1, problem.paged.page_tokens
    pages = found["page_table"].gather(1, (at // page)[:, None].long())[:, 0]
    found["token_slots"] = pages.long() * page + at % page
    for cache in (found["k_cache"], found["v_cache"]):
        nothing = torch.full((len(at), *cache.shape[2:]), torch.nan, device=device)
        _kv_write.put(cache, found["token_slots"], nothing.to(cache.dtype), 1.0)
    found["kv_scales"] = torch.tensor(found["scales"], device=device)
    return found
