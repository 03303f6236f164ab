"""One attention layer on a CPU, residual to residual, in one call: for every token t of the step

    h = rms_norm(x_t) · norm_weight;  q, k, v = split(h · qkv_weightᵀ + qkv_bias)
    q, k = rotary(rms_norm over head_dim of q, k)                (the norm only where the model has one)
    cache[token_slots_t] = k, v
    o_h = softmax(scale · q_h · K) · V   over positions 0 … positions_t of its request, in its pages
    out_t = x_t + o · o_weightᵀ

x, out [tokens, hidden] float32; cache k, v [pages, page_tokens, kv_heads, head_dim] float32; page_table
[requests, max_pages] int64. All of a step's keys are written before any is read, so chunks of a prompt and
decode tokens mix freely. Sums in float32; softmax subtracts the row's maximum. A decode token passes over its
pages twice (scores, then values), one group of query heads at a time; chunks of a prompt go in tiles of 16
tokens. Fusing it all saves the 30 to 50 operator calls of a layer, which is most of a small model's time.
Measured: EPYC, one thread, 2026-11-21, see docs/log/2026-11-21-first-light.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numba import prange

from firebox.hardware.base import Gpu
from firebox.kernels import _blocks
from firebox.kernels._cpu import F0, exp, jit, matmul, pack, rms_norm, rotate
from firebox.step import Pages, Step

# ---- 1. the problem

OP = _blocks.ATTENTION_BLOCK
Problem = _blocks.AttentionProblem


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """CPU, float32 throughout: it reads keys and values where they lie."""
    if gpu.kind != "cpu":
        return "is made for a CPU"
    if problem.dtype != torch.float32:
        return f"computes in float32, not {problem.dtype}"
    if problem.kv_dtype != torch.float32:
        return f"reads a cache in float32 and decodes no other, not {problem.kv_dtype}"
    if problem.qk_norm == "row" or problem.output_gate or problem.o_bias:
        return "knows no norm over all heads, no output gate and no output bias"
    if problem.sinks or problem.window_tokens is not None:
        return "knows no sinks and no window"
    return None


# ---- 2. the device code

TILE = 16  # consecutive prompt tokens whose attention is two matrix products over gathered keys and values
SMALLEST_TILE = 4  # below it, gathering costs more than it saves


def _attend(
    q: np.ndarray,  # [heads + 2 · kv_heads, head_dim]: the queries come first
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    pages: np.ndarray,  # [max_pages]
    context: int,
    scale: float,
    scores: np.ndarray,  # [group, ≥ context] scratch
    out: np.ndarray,  # [heads, head_dim]
) -> None:
    page_tokens, kv_heads, head_dim = k_cache.shape[1:]
    group = out.shape[0] // kv_heads
    for kv_head in range(kv_heads):
        first = kv_head * group
        for j in range(context):
            page, row = pages[j // page_tokens], j % page_tokens
            for g in range(group):
                total = F0
                for d in range(head_dim):
                    total += q[first + g, d] * k_cache[page, row, kv_head, d]
                scores[g, j] = total * scale
        for g in range(group):
            top = scores[g, 0]
            for j in range(1, context):
                top = max(top, scores[g, j])
            total = F0
            for j in range(context):
                scores[g, j] = exp(scores[g, j] - top)
                total += scores[g, j]
            for d in range(head_dim):
                out[first + g, d] = F0
            inverse = np.float32(1.0) / total
            for j in range(context):
                page, row = pages[j // page_tokens], j % page_tokens
                weight = scores[g, j] * inverse
                for d in range(head_dim):
                    out[first + g, d] += weight * v_cache[page, row, kv_head, d]


attend = jit(_attend)


def _attend_tile(
    q: np.ndarray,  # [tile, heads + 2 · kv_heads, head_dim]: consecutive tokens of one request
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    pages: np.ndarray,
    context: int,  # of the tile's last token
    scale: float,
    out: np.ndarray,  # [tile, heads, head_dim]
) -> None:
    tile = q.shape[0]
    page_tokens, kv_heads, head_dim = k_cache.shape[1:]
    heads = out.shape[1]
    group = heads // kv_heads
    rows = np.empty((tile * group, head_dim), np.float32)
    keys = np.empty((context, head_dim), np.float32)
    values = np.empty((head_dim, context), np.float32)
    scores = np.empty((tile * group, context), np.float32)
    for kv_head in range(kv_heads):
        for j in range(context):
            page, row = pages[j // page_tokens], j % page_tokens
            for d in range(head_dim):
                keys[j, d] = k_cache[page, row, kv_head, d]
                values[d, j] = v_cache[page, row, kv_head, d]
        for t in range(tile):
            for g in range(group):
                for d in range(head_dim):
                    rows[t * group + g, d] = q[t, kv_head * group + g, d] * scale
        matmul(rows, keys, 0, context, scores)
        for t in range(tile):
            seen = context - tile + t + 1
            for g in range(group):
                line = scores[t * group + g]
                top = line[:seen].max()
                total = F0
                for j in range(seen):
                    line[j] = exp(line[j] - top)
                    total += line[j]
                inverse = np.float32(1.0) / total
                for j in range(seen):
                    line[j] *= inverse
                for j in range(seen, context):
                    line[j] = F0
        matmul(scores, values, 0, head_dim, rows)
        for t in range(tile):
            for g in range(group):
                for d in range(head_dim):
                    out[t, kv_head * group + g, d] = rows[t * group + g, d]


attend_tile = jit(_attend_tile)


def _tiles(token_rows: np.ndarray) -> tuple[np.ndarray, int]:
    tokens = token_rows.shape[0]
    starts = np.empty(tokens + 1, np.int64)
    count = 0
    for t in range(tokens):
        if count == 0 or token_rows[t] != token_rows[t - 1] or t - starts[count - 1] == TILE:
            starts[count] = t
            count += 1
    starts[count] = tokens
    return starts, count


tiles = jit(_tiles)


def _attention_block(
    x: np.ndarray,
    positions: np.ndarray,
    token_slots: np.ndarray,
    token_rows: np.ndarray,
    page_table: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    norm_weight: np.ndarray,
    qkv_weight: np.ndarray,
    qkv_bias: np.ndarray,
    q_norm: np.ndarray,
    k_norm: np.ndarray,
    o_weight: np.ndarray,
    cos: np.ndarray,  # [positions, rotary_dim / 2]
    sin: np.ndarray,
    heads: int,
    eps: float,
    scale: float,
    chunks: int,
    out: np.ndarray,
) -> None:
    tokens, hidden = x.shape
    page_tokens, kv_heads, head_dim = k_cache.shape[1:]
    rows = qkv_weight.shape[0]
    h = np.empty((tokens, hidden), np.float32)
    rms_norm(x, norm_weight, eps, h)
    qkv = np.empty((tokens, rows), np.float32)
    for c in prange(chunks):
        matmul(h, qkv_weight, c * rows // chunks, (c + 1) * rows // chunks, qkv)
    for t in range(tokens):
        if qkv_bias.shape[0] > 0:
            for n in range(rows):
                qkv[t, n] += qkv_bias[n]
        parts = qkv[t].reshape((heads + 2 * kv_heads, head_dim))
        if q_norm.shape[0] > 0:
            rms_norm(parts[:heads], q_norm, eps, parts[:heads])
            rms_norm(parts[heads : heads + kv_heads], k_norm, eps, parts[heads : heads + kv_heads])
        for head in range(heads + kv_heads):
            rotate(parts[head], cos[positions[t]], sin[positions[t]])
        page, row = token_slots[t] // page_tokens, token_slots[t] % page_tokens
        for kv_head in range(kv_heads):
            for d in range(head_dim):
                k_cache[page, row, kv_head, d] = parts[heads + kv_head, d]
                v_cache[page, row, kv_head, d] = parts[heads + kv_heads + kv_head, d]
    attended = np.empty((tokens, heads, head_dim), np.float32)
    starts, count = tiles(token_rows)
    for i in prange(count):
        first, last = starts[i], starts[i + 1]
        q = qkv[first:last].reshape((last - first, heads + 2 * kv_heads, head_dim))
        pages = page_table[token_rows[first]]
        if last - first >= SMALLEST_TILE:
            attend_tile(q, k_cache, v_cache, pages, positions[last - 1] + 1, scale, attended[first:last])
        else:
            for t in range(first, last):
                context = positions[t] + 1
                scores = np.empty((heads // kv_heads, context), np.float32)
                attend(q[t - first], k_cache, v_cache, pages, context, scale, scores, attended[t])
    flat = attended.reshape((tokens, heads * head_dim))
    for c in prange(chunks):
        matmul(flat, o_weight, c * hidden // chunks, (c + 1) * hidden // chunks, out)
    for t in range(tokens):
        for i in range(hidden):
            out[t, i] += x[t, i]


_serial = jit(_attention_block)
_parallel = jit(_attention_block, parallel=True)

# ---- 3. bind


def bind(
    problem: Problem, weights: Mapping[str, torch.Tensor], threads: int
) -> Callable[[torch.Tensor, Step, Any], torch.Tensor]:
    """A launcher `run(x, step, layer_cache) -> out`. `weights`: norm, qkv, qkv_bias, q_norm, k_norm, o (as in
    the docstring), cos, sin [positions, rotary_dim / 2]; absent ones are empty tensors."""
    packed = {name: pack(weights[name]) for name in ("qkv", "o")}
    plain = {
        name: weights[name].float().contiguous().numpy().copy()
        for name in ("norm", "qkv_bias", "q_norm", "k_norm")
    }
    cos, sin = weights["cos"].numpy(), weights["sin"].numpy()  # one pair for all layers
    kernel, chunks = (_parallel, 4 * threads) if threads > 1 else (_serial, 1)
    scale, eps, heads = np.float32(problem.head_dim**-0.5), np.float32(problem.eps), problem.heads

    def run(x: torch.Tensor, step: Step, layer_cache: Any) -> torch.Tensor:
        out = torch.empty_like(x)
        kernel(
            x.numpy(),
            step.positions.numpy(),
            step.full.token_slots.numpy(),
            step.token_rows.numpy(),
            step.full.table.numpy(),
            layer_cache.k.numpy(),
            layer_cache.v.numpy(),
            plain["norm"],
            packed["qkv"],
            plain["qkv_bias"],
            plain["q_norm"],
            plain["k_norm"],
            packed["o"],
            cos,
            sin,
            heads,
            eps,
            scale,
            chunks,
            out.numpy(),
        )
        return out

    return run


# ---- 4. the reference


def reference(problem: Problem, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The formula token by token in float64; also writes the caches of `inputs`."""
    w = {name: tensor.double() for name, tensor in inputs["weights"].items()}
    step, cache, x = inputs["step"], inputs["cache"], inputs["x"].double()
    heads, kv_heads, head_dim, half = (
        problem.heads,
        problem.kv_heads,
        problem.head_dim,
        problem.rotary_dim // 2,
    )

    def norm(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * values / (values.pow(2).mean(-1, keepdim=True) + problem.eps).sqrt()

    def rope(values: torch.Tensor, position: int) -> torch.Tensor:
        a, b, rest = values[:, :half], values[:, half : 2 * half], values[:, 2 * half :]
        c, s = w["cos"][position], w["sin"][position]
        return torch.cat([a * c - b * s, b * c + a * s, rest], -1)

    queries = []
    for t in range(x.shape[0]):
        qkv = w["qkv"] @ norm(x[t], w["norm"])
        if problem.bias:
            qkv = qkv + w["qkv_bias"]
        q, k, v = qkv.view(-1, head_dim).split([heads, kv_heads, kv_heads])
        if problem.qk_norm:
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        position = int(step.positions[t])
        queries.append(rope(q, position))
        slot = int(step.full.token_slots[t])
        cache.k.flatten(0, 1)[slot] = rope(k, position).float()
        cache.v.flatten(0, 1)[slot] = v.float()
    out = []
    for t, q in enumerate(queries):
        pages = step.full.table[int(step.token_rows[t])]
        context = int(step.positions[t]) + 1
        k = cache.k[pages].flatten(0, 1)[:context].double().repeat_interleave(heads // kv_heads, 1)
        v = cache.v[pages].flatten(0, 1)[:context].double().repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("hd,jhd->hj", q, k) * head_dim**-0.5
        attended = torch.einsum("hj,jhd->hd", scores.softmax(-1), v)
        out.append(x[t] + w["o"] @ attended.flatten())
    return torch.stack(out).float()


# ---- 5. inputs, cases, tolerance

# (problem, tokens per request in this step, context of each request after it)
CASES = (
    (Problem(256, 4, 2, 64, 32, "head", True, 1e-5), (1,), (1,)),
    (Problem(256, 4, 2, 64, 32, "head", True, 1e-5), (1, 1, 1), (5, 33, 257)),
    (Problem(256, 4, 2, 64, 32, "head", True, 1e-5), (7, 1, 20), (7, 16, 50)),
    (Problem(64, 4, 1, 16, 16, "head", False, 1e-6), (5, 3), (17, 3)),
    (Problem(48, 3, 3, 24, 8, "", True, 1e-6), (1, 33), (100, 40)),
)
# float32 sums of up to a few hundred terms against float64, relative to the reference's RMS
TOLERANCE = 2e-6


def inputs(case: tuple[Problem, tuple[int, ...], tuple[int, ...]], seed: int = 0) -> dict[str, Any]:
    """Random weights, the step, and caches full of earlier keys in shuffled pages; every slot no request owns
    is NaN."""
    problem, counts, contexts = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    page_tokens, most = 16, max(contexts)
    max_pages = -(-most // page_tokens)
    order = torch.randperm(len(contexts) * max_pages, generator=generator) + 1
    page_table = torch.zeros(len(contexts), max_pages, dtype=torch.int64)
    shape = (len(order) + 1, page_tokens, problem.kv_heads, problem.head_dim)
    k, v = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    positions, slots, rows = [], [], []
    for r, (count, context) in enumerate(zip(counts, contexts, strict=True)):
        pages = -(-context // page_tokens)
        page_table[r, :pages] = order[r * max_pages : r * max_pages + pages]
        for position in range(context):
            slot = int(page_table[r, position // page_tokens]) * page_tokens + position % page_tokens
            if position >= context - count:
                positions.append(position)
                slots.append(slot)
                rows.append(r)
            else:
                k.flatten(0, 1)[slot], v.flatten(0, 1)[slot] = normal(*shape[2:]), normal(*shape[2:])
    step = Step(
        positions=torch.tensor(positions),
        token_rows=torch.tensor(rows),
        query_start=np.cumsum([0, *counts]),
        context_tokens=np.array(contexts),
        caches=(),
        full=Pages(torch.tensor(slots), page_table, None),
    )
    qkv_rows = (problem.heads + 2 * problem.kv_heads) * problem.head_dim
    attended = problem.heads * problem.head_dim
    angle = torch.arange(most).unsqueeze(-1) * 10000.0 ** -torch.linspace(0, 1, problem.rotary_dim // 2)
    norm_width = problem.head_dim if problem.qk_norm else 0
    weights = {
        "norm": 1 + normal(problem.hidden, scale=0.1),
        "qkv": normal(qkv_rows, problem.hidden, scale=problem.hidden**-0.5),
        "qkv_bias": normal(qkv_rows if problem.bias else 0, scale=0.3),
        "q_norm": 1 + normal(norm_width, scale=0.1),
        "k_norm": 1 + normal(norm_width, scale=0.1),
        "o": normal(problem.hidden, attended, scale=attended**-0.5),
        "cos": angle.cos(),
        "sin": angle.sin(),
    }
    return {
        "x": normal(len(positions), problem.hidden),
        "step": step,
        "cache": SimpleNamespace(k=k, v=v),
        "weights": weights,
    }
