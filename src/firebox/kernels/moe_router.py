"""The router's product and the choice of experts in one launch, for few tokens (1 to 64):

    logits = x · Wᵀ + bias;  then as kernels/moe_route.py, which has the formulas and the order among equals

x [tokens, hidden] bf16; W [experts, hidden] bf16 or float32, and one more row for the shared expert's gate
where the problem has one; router_bias, correction_bias [experts] float32. Products are exact: a float32
weight is the sum of three bf16 numbers, each multiplied on its own. Sums in float32.

A program takes ROWS experts, DEPTH columns (a warp's share each: PARTS of them are added up in their order)
and TOKENS tokens, reads its part of W before the launch before has ended, and writes `partial` [splits,
tokens, rows of W] float32; the last one of its tokens (a counter says so; it is zero before and after) adds
up the splits in their order and chooses. For one Config the result depends neither on which program ends last
nor on the other tokens.

Source: own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import moe_route
from firebox.kernels._experts import DTYPES, POINTER_NAMES, let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher
from firebox.kernels.moe_route import choose, numbers, store_choices

# ---- 1. the problem

OP = "moe_router"
MAX_TOKENS = 64


@dataclass(frozen=True)
class Problem:
    """`route`: the choice. `biases`: the product has a bias. `dtype`: of x, "bf16" or "f16";
    `weight_dtype`: of W, x's or "f32"."""

    hidden: int
    route: moe_route.Problem
    biases: bool = False
    dtype: str = "bf16"
    weight_dtype: str = "bf16"

    @property
    def rows(self) -> int:
        """Of W."""
        return self.route.experts + self.route.shared_gate


@dataclass(frozen=True)
class Config:
    """`rows` of W, `depth` columns (a power of two) and `tokens` that a program takes; `at_once`: tokens that
    the last one chooses experts for together."""

    rows: int = 16
    depth: int = 512
    tokens: int = 8
    at_once: int = 8
    warps: int = 8


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs."""
    if problem.weight_dtype not in (problem.dtype, "f32"):
        return f"multiplies {problem.dtype} with itself or float32, not with {problem.weight_dtype}"
    return moe_route.accepts(problem.route, gpu)


def search_space(problem: Problem, tokens: int, gpu: Gpu) -> Iterator[Config]:
    """Tiles that are worth compiling."""
    at_once = min(8, triton.next_power_of_2(tokens))
    for depth in (256, 512, 1024, 2048):
        for width in (8, 16) if tokens > 8 else (8,):
            yield from (Config(16, depth, width, at_once, warps) for warps in (4, 8))


def default(problem: Problem, tokens: int, gpu: Gpu) -> Config:
    """So many splits that the programs fill the GPU about once."""
    tiles = -(-problem.rows // 16)
    deepest = 512 if problem.weight_dtype == "f32" else 1024
    enough = [
        d for d in (256, 512, 1024) if d <= deepest and tiles * -(-problem.hidden // d) >= 0.7 * gpu.sms
    ]
    at_once = min(8, triton.next_power_of_2(tokens))
    return Config(depth=max(enough, default=256), tokens=8 if tokens <= 8 else 16, at_once=at_once)


def splits(problem: Problem, config: Config) -> int:
    """Programs along the columns."""
    return -(-problem.hidden // config.depth)


def scratch(
    problem: Problem, config: Config, tokens: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`partial`, and `counters` [token blocks] int32, which are zero between calls."""
    partial = torch.empty(splits(problem, config), tokens, problem.rows, device=device)
    return partial, torch.zeros(-(-tokens // config.tokens), dtype=torch.int32, device=device)


# ---- 2. the device code


@triton.jit
def _products(
    w, x, TERMS: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr
):  # fmt: skip
    """`w` [PARTS, ROWS, columns] as TERMS numbers of type DTYPE, each times `x` [PARTS, TOKENS, columns] →
    [ROWS, TOKENS]. A warp multiplies one part: with 16 rows, several could only repeat each other's work."""
    acc = tl.zeros((PARTS, ROWS, TOKENS), tl.float32)
    columns = tl.permute(x, (0, 2, 1))
    if TERMS == 1:
        acc = tl.dot(w, columns, acc)
    else:
        for _ in tl.static_range(TERMS):
            term = w.to(DTYPE)
            w -= term.to(tl.float32)
            acc = tl.dot(term, columns, acc)
    return tl.sum(acc, 0)


@triton.jit
def _logits(
    partial, token, live, expert, there, tokens, ROWS_OF_W: tl.constexpr, SPLITS: tl.constexpr,
    TOKENS: tl.constexpr, GROUPS_PADDED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The splits added up, around the L1 cache (.cg), which may hold what stood there before."""
    total = tl.zeros((TOKENS, GROUPS_PADDED, SIZE), tl.float32)
    for split in tl.static_range(SPLITS):
        row = split * tokens + token
        at = partial + row[:, None, None].to(tl.int64) * ROWS_OF_W + expert
        total += tl.load(at, mask=live[:, None, None] & there, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _choose_some(
    partial, router_bias, bias, expert, there, token, tokens, expert_ids, routing_weights,
    ROWS_OF_W: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr, GATE: tl.constexpr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr,
    SCORING: tl.constexpr, RENORMALISE: tl.constexpr, SCALE: tl.constexpr, GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """`token` [TOKENS]."""
    live = token < tokens
    logits = _logits(
        partial, token, live, expert, there, tokens, ROWS_OF_W, SPLITS, TOKENS, GROUPS_PADDED, SIZE
    )
    if router_bias is not None:
        logits += tl.load(router_bias + expert, mask=there, other=0.0)
    shared_weight = 1.0
    if GATE:
        first = tl.zeros((1, 1, 1), tl.int32)
        gate = _logits(
            partial, token, live, first + EXPERTS, first == 0, tokens, ROWS_OF_W, SPLITS, TOKENS, 1, 1
        )
        shared_weight = tl.sigmoid(tl.reshape(gate, (TOKENS, 1)))
    ids, weight = choose(
        logits, bias, expert, there, TOKENS, TOP_K, WIDTH, SCORING, RENORMALISE, SCALE, GROUPS, KEPT
    )
    store_choices(
        ids, weight, shared_weight, token, live, expert_ids, routing_weights, EXPERTS, TOP_K, SHARED, WIDTH
    )


@triton.jit
def product_and_route(
    x, w, router_bias, correction_bias, partial, counters, expert_ids, routing_weights, tokens,
    HIDDEN: tl.constexpr, ROWS_OF_W: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, TOKENS: tl.constexpr, AT_ONCE: tl.constexpr, SPLITS: tl.constexpr,
    TERMS: tl.constexpr, DTYPE: tl.constexpr, GATE: tl.constexpr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr,
    SCORING: tl.constexpr, RENORMALISE: tl.constexpr, SCALE: tl.constexpr, GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    block = tl.program_id(2)
    let_next_launch_begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = block * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    row_there = row < ROWS_OF_W
    part_of_depth = tl.arange(0, PARTS)[:, None, None] * (DEPTH // PARTS)
    column = split * DEPTH + part_of_depth + tl.arange(0, DEPTH // PARTS)[None, None, :]
    weights = tl.load(
        w + row[None, :, None].to(tl.int64) * HIDDEN + column,
        mask=row_there[None, :, None] & (column < HIDDEN), other=0.0,
    )  # fmt: skip
    wait_for_launch_before(PDL)
    xs = tl.load(
        x + token[None, :, None].to(tl.int64) * HIDDEN + column,
        mask=live[None, :, None] & (column < HIDDEN), other=0.0,
    )  # fmt: skip
    part = _products(weights, xs, TERMS, DTYPE, PARTS, ROWS, TOKENS)
    at = partial + (split * tokens + token)[None, :].to(tl.int64) * ROWS_OF_W + row[:, None]
    tl.store(at, part, mask=live[None, :] & row_there[:, None])
    tl.debug_barrier()  # every thread's sums are written before the counter says so
    ended = tl.atomic_add(counters + block, 1, sem="acq_rel")
    if ended == tl.num_programs(0) * SPLITS - 1:
        tl.debug_barrier()
        expert, there = numbers(EXPERTS, GROUPS, GROUPS_PADDED, SIZE)
        bias = None
        if correction_bias is not None:
            bias = tl.load(correction_bias + expert, mask=there, other=0.0)
        for first in range(block * TOKENS, tl.minimum(block * TOKENS + TOKENS, tokens), AT_ONCE):
            _choose_some(
                partial, router_bias, bias, expert, there, first + tl.arange(0, AT_ONCE), tokens,
                expert_ids, routing_weights,
                ROWS_OF_W, SPLITS, AT_ONCE, GATE, EXPERTS, TOP_K, SHARED, WIDTH, SCORING, RENORMALISE, SCALE,
                GROUPS, GROUPS_PADDED, SIZE, KEPT,
            )  # fmt: skip
        tl.store(counters + block, 0)


# ---- 3. the launch


def request(problem: Problem, config: Config, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """One compile for all numbers of tokens that share `config`."""
    p, pdl = problem, "pdl" in gpu.facts and not interpreted
    names = POINTER_NAMES | {"f32": "fp32"}
    present = {
        "x": f"*{names[p.dtype]}",
        "w": f"*{names[p.weight_dtype]}",
        "router_bias": "*fp32" if p.biases else "",
        "correction_bias": "*fp32" if p.route.scoring == "sigmoid" else "",
        **dict.fromkeys(("partial", "routing_weights"), "*fp32"),
        **dict.fromkeys(("counters", "expert_ids"), "*i32"),
    }
    pointers = {name: type for name, type in present.items() if type}
    constants = moe_route.constants(p.route) | {
        "HIDDEN": p.hidden,
        "ROWS_OF_W": p.rows,
        "ROWS": config.rows,
        "DEPTH": config.depth,
        "PARTS": config.warps,
        "TOKENS": config.tokens,
        "AT_ONCE": config.at_once,
        "SPLITS": splits(p, config),
        "TERMS": 3 if p.weight_dtype == "f32" else 1,
        "DTYPE": DTYPES[p.dtype],
        "GATE": p.route.shared_gate,
        "PDL": pdl,
    }
    return CompileRequest(
        product_and_route,
        pointers | {"tokens": "i32"},
        dict.fromkeys(name for name, type in present.items() if not type) | constants,
        gpu,
        tuple(pointers),
        num_warps=config.warps,
        options={"launch_pdl": True} if pdl else {},
        declares=(p.dtype,),
    )


def run(
    launcher: Launcher,
    x: torch.Tensor,
    w: torch.Tensor,
    router_bias: torch.Tensor | None,
    correction_bias: torch.Tensor | None,
    partial: torch.Tensor,
    counters: torch.Tensor,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
) -> None:
    """Writes `expert_ids`, `routing_weights` [tokens, choices] and `partial` (at least as large as `scratch`
    makes it for so many tokens); `counters` are zero and come back zero."""
    tokens, constants = x.shape[0], launcher.request.constexprs
    given = {"router_bias": router_bias, "correction_bias": correction_bias}
    optional = {name: tensor for name, tensor in given.items() if name in launcher.request.signature}
    grid = (-(-w.shape[0] // constants["ROWS"]), constants["SPLITS"], -(-tokens // constants["TOKENS"]))
    if tokens:
        launcher(
            grid,
            x=x,
            w=w,
            partial=partial,
            counters=counters,
            expert_ids=expert_ids,
            routing_weights=routing_weights,
            tokens=tokens,
            **optional,
        )


# ---- 4. the reference


def reference(
    problem: Problem,
    x: torch.Tensor,
    w: torch.Tensor,
    router_bias: torch.Tensor | None = None,
    correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """expert_ids (int64) and routing_weights; the product in float64."""
    route = problem.route
    logits = (x.double() @ w.double().T).float()
    gate = logits[:, route.experts] if route.shared_gate else None
    logits = logits[:, : route.experts]
    if router_bias is not None:
        logits = logits + router_bias
    return moe_route.reference(route, logits, correction_bias, gate)
