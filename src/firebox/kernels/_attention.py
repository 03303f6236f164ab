"""What the two attention kernels share: the problem, what a step gives them, the inner step on the device.

    out_i = Σ_j a_ij · V_j,   a_i = softmax over j of scale · q_i · K_j, and the head's sink, if there is one

over the keys j that query i sees, which lie in pages:

    position j of request r   row j % page_tokens of page page_table[r, j // page_tokens]
    context_tokens[r]         keys of request r in the cache, those of this step's queries included
    query i of request r      row query_start[r] + i of q; its own key is at position context − queries + i

It sees positions up to its own; with a window of w only the last w of these; with a tree all positions before
the step's own tokens and, of those, the ones that its row of the tree names. Its own position is then the
prefix and how many own tokens it sees, less one, and a tree is never deeper than a window.

All query heads of a key head are rows of one matrix: row m of a request and key head is query m // group,
head m % group. A latent layer has one key head of 512 + 64 columns, whose first 512 are also the value.

Numbers. Scores, maxima, sums and outputs are float32; exp2, with log2(e) in the scale. Operands of the matrix
products have the type of the queries (the cache's, where queries are float32); for an FP8 cache they are
float16, into which e4m3 converts exactly and in one instruction, and queries saturate at ±65504. A weight of
the softmax is rounded to the operands' type before it meets its value, after it has been added to the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu

LOG2E = math.log2(math.e)
TREE_QUERIES = 64  # a row of a tree is a word of 64 bits
FP8 = torch.float8_e4m3fn
TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", FP8: "fp8e4nv"}
_DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_KINDS = {torch.bfloat16: ("bf16",), torch.float16: ("f16",), torch.float32: ()}  # float32: no tensor cores

# Integers and the small arrays keep their general form: one binary, whatever a step's sizes are.
NOT_SPECIALIZED = ("window_tokens", "max_pages", "max_queries", "splits")
NOT_ALIGNED = (
    "page_table",
    "context_tokens",
    "query_start",
    "tile_requests",
    "tile_rows",
    "sinks",
    "tree_bits",
    "tree_depths",
    "partial_top",
)


# ---- 1. the problem


@dataclass(frozen=True)
class Problem:
    """One attention layer. `value_dim` below `head_dim`: the value is the key's first columns. `dtype` of q
    and of the output, `kv_dtype` of the cache. `window`, `tree`: such masks apply; `sinks`: their dtype, or
    None."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    page_tokens: int
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    window: bool = False
    sinks: torch.dtype | None = None
    tree: bool = False

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def latent(self) -> bool:
        """Is the value a part of the key?"""
        return self.value_dim != self.head_dim

    @property
    def dot_dtype(self) -> torch.dtype:
        """Of the operands of the matrix products."""
        if self.kv_dtype == FP8:
            return torch.float16
        return self.kv_dtype if torch.float32 in (self.dtype, self.kv_dtype) else self.dtype

    @property
    def declares(self) -> tuple[str, ...]:
        """The operand kinds of the tensor instructions, as kernels.compile names them."""
        return _KINDS[self.dot_dtype]


@dataclass(frozen=True)
class Config:
    """A tile: `block_m` rows of queries, `block_n` keys at a time. `max_registers` a thread, below what the
    compiler would take, lets another block onto the multiprocessor."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def limits(self) -> dict[str, int]:
        """Triton's further options."""
        return {} if self.max_registers is None else {"maxnreg": self.max_registers}


@dataclass(frozen=True)
class Paged:
    """What a step's queries are and where their keys lie, on the device: `page_table` [requests, max_pages],
    `context_tokens` [requests] and `query_start` [requests + 1], int32. With a tree: `tree_bits` [tokens]
    int64, bit j of a token for own token j of its request, and `tree_depths` [tokens] int32, how many bits
    are set, less one; requests of more than 64 queries are causal."""

    page_table: torch.Tensor
    context_tokens: torch.Tensor
    query_start: torch.Tensor
    tree_bits: torch.Tensor | None = None
    tree_depths: torch.Tensor | None = None

    @property
    def requests(self) -> int:
        """How many there are, those without a query included."""
        return self.page_table.shape[0]


def pack_tree(tree: torch.Tensor, query_start: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """`tree_bits` and `tree_depths` of Paged, from `tree` [requests, queries, queries] bool: row i names the
    own tokens that query i sees, itself among them. It has room for all requests of up to 64 queries; what it
    says of longer ones is not used."""
    width, counts = tree.shape[1], np.diff(query_start)
    short = counts[counts <= TREE_QUERIES]
    assert max(short, default=0) <= width <= TREE_QUERIES, (short, width)
    owners = np.repeat(np.arange(len(counts)), counts)
    places = np.minimum(np.arange(len(owners)) - query_start[owners], width - 1)
    rows = tree[torch.from_numpy(owners).to(tree.device), torch.from_numpy(places).to(tree.device)]
    bits = torch.ones(width, dtype=torch.int64, device=tree.device) << torch.arange(width, device=tree.device)
    return torch.where(rows, bits, 0).sum(-1), (rows.sum(-1) - 1).to(torch.int32)


def unsupported(heads: int, kv_heads: int, head_dim: int, value_dim: int) -> str | None:
    """None, or why the kernels do not compute such a layer."""
    if heads % kv_heads:
        return f"needs as many or a multiple of query heads, not {heads} over {kv_heads} key heads"
    if value_dim != head_dim and (head_dim, value_dim) != (576, 512):
        return f"supports latent rows of 512 + 64 columns, not {value_dim} + {head_dim - value_dim}"
    if value_dim == head_dim and head_dim not in (64, 128, 192, 256):
        return f"supports head_dim 64, 128, 192 and 256, not {head_dim}"
    return None


def declined(problem: Problem, gpu: Gpu) -> str | None:
    """None, or why the kernels cannot run a layer on that device."""
    if gpu.kind != "cuda":
        return "runs on NVIDIA GPUs"
    if problem.kv_dtype == FP8 and "fp8" not in gpu.facts:
        return f"reads no fp8 cache on {gpu.name}, which lacks the type"
    return unsupported(problem.heads, problem.kv_heads, problem.head_dim, problem.value_dim)


def constants(problem: Problem, config: Config) -> dict[str, Any]:
    """The constants that both kernels take."""
    return {
        "HEADS": problem.heads,
        "KV_HEADS": problem.kv_heads,
        "HEAD_DIM": problem.head_dim,
        "VALUE_DIM": problem.value_dim,
        "WIDTH": triton.next_power_of_2(problem.value_dim),
        "PAGE_TOKENS": problem.page_tokens,
        "WINDOW": problem.window,
        "DOT": _DOT_TYPES[problem.dot_dtype],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


def signature(problem: Problem, further: Mapping[str, str]) -> tuple[dict[str, str], dict[str, None]]:
    """Types of the run-time arguments that both kernels take, and the absent ones."""
    q, kv = (f"*{TRITON_TYPES[dtype]}" for dtype in (problem.dtype, problem.kv_dtype))
    types = {"q": q, "k_cache": kv, "v_cache": kv, "out": q, **further}
    types |= dict.fromkeys(("page_table", "context_tokens", "query_start"), "*i32")
    types |= {"scale": "fp32", "v_scale": "fp32", "window_tokens": "i32", "max_pages": "i32"}
    absent = []
    if problem.sinks:
        types["sinks"] = f"*{TRITON_TYPES[problem.sinks]}"
    else:
        absent.append("sinks")
    if problem.tree:
        types |= {"tree_bits": "*i64", "tree_depths": "*i32"}
    else:
        absent += ["tree_bits", "tree_depths"]
    return types, dict.fromkeys(absent)


def check(problem: Problem, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Our mistakes: tensors that are not laid out as the kernels read them."""
    row = problem.kv_heads * problem.head_dim
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        strides = (problem.page_tokens * row, row, problem.head_dim, 1)
        assert cache.stride() == strides, f"{name} has strides {cache.stride()}, not {strides}"
    assert not problem.latent or k_cache.data_ptr() == v_cache.data_ptr(), "a latent layer's v is a view of k"
    assert q.is_contiguous() and q.shape[1:] == (problem.heads, problem.head_dim), (q.shape, q.stride())
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        assert tensor.data_ptr() % 16 == 0, f"{name} is not aligned to 16 bytes"


# ---- 2. the device code


@triton.jit
def load_queries(
    q, token, head, valid, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr,
    USED: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Columns FIRST … FIRST + USED − 1 of the queries (`token`, `head`) [BLOCK_M] → [BLOCK_M, WIDTH]."""
    columns = tl.arange(0, WIDTH)
    at = q + (token * HEADS + head)[:, None] * HEAD_DIM + FIRST + columns[None, :]
    return to_dot(tl.load(at, mask=valid[:, None] & (columns < USED)[None, :], other=0.0), DOT)


@triton.jit
def load_rows(base, at, inside, USED: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """USED columns of the cache's rows at offsets `at` [BLOCK_N] → [BLOCK_N, WIDTH]. MASKED: rows that are
    not `inside` [BLOCK_N] are not read, and zero."""
    columns = tl.arange(0, WIDTH)
    at = base + at[:, None] + columns[None, :]
    used = (columns < USED)[None, :]
    if MASKED:
        rows = tl.load(at, mask=inside[:, None] & used, other=0.0)
    elif WIDTH > USED:
        rows = tl.load(at, mask=used, other=0.0)
    else:
        rows = tl.load(at)
    return to_dot(rows, DOT)


@triton.jit
def to_dot(x, DOT: tl.constexpr):
    """`x` as an operand of a matrix product."""
    WIDER: tl.constexpr = x.dtype == tl.bfloat16 or x.dtype == tl.float32
    if WIDER and DOT == tl.float16:  # noqa: SIM300 (types, not constants)
        x = tl.clamp(x.to(tl.float32), -65504.0, 65504.0)
    return x.to(DOT)


@triton.jit
def locate(pages, start, inside, BLOCK_N: tl.constexpr, ROW: tl.constexpr, PAGE_TOKENS: tl.constexpr):
    """Where in the cache the rows at positions start … start + BLOCK_N − 1 begin, `start` a multiple of
    BLOCK_N: an offset in int64, and further ones [BLOCK_N]. Where pages hold whole blocks, one page number a
    block; the further offsets are then small and the same every time. Else one a row."""
    rows = tl.arange(0, BLOCK_N)
    if PAGE_TOKENS % BLOCK_N == 0:
        page = tl.load(pages + start // PAGE_TOKENS).to(tl.int64)
        base, offsets = (page * PAGE_TOKENS + start % PAGE_TOKENS) * ROW, rows * ROW
    else:
        at = start + rows
        page_ids = tl.load(pages + at // PAGE_TOKENS, mask=inside, other=0).to(tl.int64)
        base, offsets = 0, (page_ids * PAGE_TOKENS + at % PAGE_TOKENS) * ROW
    return base, offsets


@triton.jit
def reach(tree_bits, tree_depths, token, query, queries, prefix, TREE_QUERIES: tl.constexpr):
    """What the queries see [BLOCK_M]: the last position that they see with all before it, their own position,
    and bits for own tokens beyond (of no meaning without a tree)."""
    positions = prefix + query
    last = positions
    bits = query.to(tl.int64)
    if tree_bits is not None:
        in_tree = query < tl.where(queries <= TREE_QUERIES, queries, 0)
        bits = tl.load(tree_bits + token, mask=in_tree, other=0)
        positions = tl.where(in_tree, prefix + tl.load(tree_depths + token, mask=in_tree, other=0), positions)
        last = tl.where(in_tree, prefix - 1, last)
    return last, positions, bits


@triton.jit
def attend_block(
    acc, top, total, q, q_tail, k_cache, v_cache, pages, start, lowest, end, scale, prefix, last, positions,
    bits, window_tokens, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KV_HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """The state of the softmax (acc [BLOCK_M, WIDTH], top and total [BLOCK_M]) after the keys start … start +
    BLOCK_N − 1, of which those below `lowest` (of a window) and from `end` on are not read. Not MASKED: every
    row sees all of them."""
    TAIL: tl.constexpr = HEAD_DIM - VALUE_DIM
    at = start + tl.arange(0, BLOCK_N)
    inside = (at >= lowest) & (at < end) if WINDOW else at < end
    base, offsets = locate(pages, start, inside, BLOCK_N, KV_HEADS * HEAD_DIM, PAGE_TOKENS)
    k = load_rows(k_cache + base, offsets, inside, VALUE_DIM, WIDTH, DOT, MASKED)  # [BLOCK_N, WIDTH]
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if TAIL > 0:
        tail = load_rows(k_cache + base + VALUE_DIM, offsets, inside, TAIL, TAIL, DOT, MASKED)
        scores = tl.dot(q_tail, tl.trans(tail), scores, input_precision="ieee")
        v = k
    else:
        v = load_rows(v_cache + base, offsets, inside, VALUE_DIM, WIDTH, DOT, MASKED)
    if MASKED:
        seen = at[None, :] <= last[:, None]
        if TREE:
            own = tl.minimum(tl.maximum(at - prefix, 0), 63).to(tl.int64)
            named = ((bits[:, None] >> own[None, :]) & 1) == 1
            seen = seen | (named & (at >= prefix)[None, :])
        seen = seen & inside[None, :]
        if WINDOW:
            seen = seen & (at[None, :] > (positions - window_tokens)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    return softmax_step(acc, top, total, scores, v, scale, DOT, MASKED)


@triton.jit
def softmax_step(acc, top, total, scores, v, scale, DOT: tl.constexpr, MASKED: tl.constexpr):
    """The state of the softmax after the keys of `scores` [BLOCK_M, BLOCK_N] and their values `v` [BLOCK_N,
    WIDTH]. MASKED: some scores are -inf."""
    peak = tl.maximum(top, tl.max(scores, 1) * scale)
    # a row that has seen nothing yet: exp2(-inf − 0) is 0, exp2(-inf − -inf) would be NaN
    level = tl.where(peak == float("-inf"), 0.0, peak) if MASKED else peak
    weights = tl.exp2(scores * scale - level[:, None])
    fade = tl.exp2(top - level)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(DOT), v, acc * fade[:, None], input_precision="ieee")
    return acc, peak, total


@triton.jit
def store_output(
    out, acc, top, total, token, head, valid, sinks, v_scale, LOG2E: tl.constexpr, HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes the rows that are `valid` [BLOCK_M], once their sinks have taken part in the softmax."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
        peak = tl.maximum(top, sink)
        fade = tl.exp2(top - peak)
        acc, total = acc * fade[:, None], total * fade + tl.exp2(sink - peak)
    columns = tl.arange(0, WIDTH)
    at = out + (token * HEADS + head)[:, None] * VALUE_DIM + columns[None, :]
    mask = valid[:, None] & (columns < VALUE_DIM)[None, :]
    # a row that is not valid may have seen nothing
    done = acc * (v_scale / tl.where(valid, total, 1.0))[:, None]
    tl.store(at, done.to(out.dtype.element_ty), mask=mask)
