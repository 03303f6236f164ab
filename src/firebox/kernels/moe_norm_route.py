"""From the residual stream to the experts of one token, in one launch instead of three: norm, the router's
logits, the choice.

    h = gain · (x / √(mean(x²) + eps));  l = W · h (+ bias);  expert_ids, routing_weights = moe_route of l

x, h [1, hidden] bf16; gain [hidden] bf16; W [experts, hidden] bf16; bias, correction_bias [experts] float32;
expert_ids, routing_weights [1, top_k + shared] as kernels/moe_route.py has them. h is rounded as rms_norm.py
does, and these rounded numbers are multiplied; products and sums are float32.

A program has ROWS rows of W, all columns of them in registers before it waits for the launch before, as in
linear_one.py; but as one tile, padded to a power of two, since every part would be one more sum over warps.
Each makes all of h, and writes a share of it and its rows' logits. The last one to end (a counter says so; it
is zero before and after) reads all logits and chooses, each warp for itself from all of them: no warp then
waits for another, which it would twice for every choice.

Source: own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _linear, moe_route, rms_norm
from firebox.kernels._experts import DTYPES, POINTER_NAMES
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels._rows import ALIGNED, PLAIN
from firebox.kernels._whole_rows import part_of_rows
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher
from firebox.kernels.moe_route import choose, store_choices

# ---- 1. the problem

OP = "moe_norm_route"
LEAST, MOST = 8, 128  # weights a thread
PROGRAMS = 128  # at most, by default
WARP_READS = 128  # float32, four a thread


@dataclass(frozen=True)
class Problem:
    """`bias`: the router has one."""

    norm: rms_norm.Problem
    route: moe_route.Problem
    bias: bool = False


@dataclass(frozen=True)
class Config:
    """A program takes `rows` experts."""

    rows: int
    warps: int


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """As rms_norm for rows alone, and as moe_route without a shared expert's gate."""
    if problem.norm.delta or problem.norm.outputs != PLAIN:
        return "writes rows alone, without a residual branch"
    if problem.route.shared_gate:
        return "knows no gate of a shared expert"
    return rms_norm.accepts(problem.norm, gpu) or moe_route.accepts(problem.route, gpu)


def search_space(problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """Tiles that are worth compiling."""
    for rows in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4, 8, 16):
            if LEAST <= rows * triton.next_power_of_2(problem.norm.width) // (32 * warps) <= MOST:
                yield Config(rows, warps)


def default(problem: Problem, gpu: Gpu) -> Config:
    """About as many programs as multiprocessors; four warps up to 64 weights a thread."""
    rows = triton.next_power_of_2(-(-problem.route.experts // PROGRAMS))
    weights = rows * triton.next_power_of_2(problem.norm.width)
    return Config(rows, 4 if weights <= 64 * 128 else 8 if weights <= MOST * 256 else 16)


# ---- 2. the device code


@triton.jit
def _by_warp(x, PARTS: tl.constexpr, WARPS: tl.constexpr):
    """[PARTS · WARPS, SIZE] → [WARPS, PARTS, SIZE], for which nothing moves."""
    return tl.permute(tl.reshape(x, (PARTS, WARPS, x.shape[1])), (1, 0, 2))


@triton.jit
def norm_route(
    x, gain, w, bias, correction_bias, out, logits, counter, expert_ids, routing_weights,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    SHARE: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
    WIDTH: tl.constexpr, SCORING: tl.constexpr, RENORMALISE: tl.constexpr, SCALE: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS: HIDDEN up to a power of two. SHARE: columns of h that a program writes. PARTS, SIZE and STEP:
    see `_divided`."""
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    mine = tl.minimum(row, EXPERTS - 1).to(tl.int64)  # of W: those behind the last read the last one
    tile = part_of_rows(w, mine * HIDDEN, 0, COLUMNS, HIDDEN)  # [ROWS, COLUMNS]
    column = tl.arange(0, COLUMNS)[None, :]
    there = column < HIDDEN
    gains = tl.load(gain + column, mask=there, other=0.0)
    added = tl.zeros((ROWS,), tl.float32)
    if bias is not None:
        added = tl.load(bias + mine)
    # A tile of which the compiler gives each warp every WARPS-th row: its copy, [PARTS, SIZE].
    member = tl.arange(0, SIZE)[None, :]
    expert = tl.arange(0, PARTS * WARPS)[:, None] // WARPS * STEP + member
    real = (member < STEP) & (expert < EXPERTS)  # [PARTS · WARPS, SIZE]
    correction = None
    if correction_bias is not None:
        loaded = tl.load(correction_bias + expert, mask=real, other=0.0)
        correction = _by_warp(loaded, PARTS, WARPS)
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    values = tl.load(x + column, mask=there, other=0.0).to(tl.float32)  # [1, COLUMNS]
    squares = tl.sum(values * values, axis=1, keep_dims=True)
    normed = (values * tl.rsqrt(squares / HIDDEN + EPS)).to(DTYPE).to(tl.float32)
    h = (normed * gains.to(tl.float32)).to(DTYPE)
    tl.store(out + column, h, mask=there & (column // SHARE == program))
    logit = tl.sum(tile.to(tl.float32) * h.to(tl.float32), axis=1) + added
    tl.store(logits + row, logit, mask=row < EXPERTS)
    tl.debug_barrier()  # every thread's logits are written before the counter says so
    ended = tl.atomic_add(counter, 1, sem="acq_rel")
    if ended == tl.num_programs(0) - 1:
        tl.debug_barrier()
        # around the L1 cache, which may hold what stood there before
        found = tl.load(logits + expert, mask=real, other=0.0, cache_modifier=".cg")
        ids, weight = choose(
            _by_warp(found, PARTS, WARPS), correction, _by_warp(expert, PARTS, WARPS),
            _by_warp(real, PARTS, WARPS), TOP_K, WIDTH, SCORING, RENORMALISE, SCALE, GROUPS, KEPT,
        )  # fmt: skip
        token = tl.zeros((WARPS,), tl.int32)  # the same numbers from every warp
        store_choices(ids, weight, 1.0, token, expert_ids, routing_weights, EXPERTS, TOP_K, SHARED, WIDTH)
        tl.store(counter, 0)


# ---- 3. the launch


def _divided(problem: moe_route.Problem) -> dict[str, int]:
    """Experts as PARTS of SIZE numbers, of which STEP count: the groups, or what a warp reads at once."""
    step = WARP_READS if problem.expert_groups == 1 else problem.experts // problem.expert_groups
    parts, size = (triton.next_power_of_2(number) for number in (-(-problem.experts // step), step))
    return {"PARTS": parts, "SIZE": max(WARP_READS, size), "STEP": step}


def request(problem: Problem, config: Config, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """The compile of this problem."""
    norm, route = problem.norm, problem.route
    pdl, plain = "pdl" in gpu.facts and not interpreted, f"*{POINTER_NAMES[norm.dtype]}"
    optional = {"bias": problem.bias, "correction_bias": route.scoring == "sigmoid"}
    types = dict.fromkeys(("x", "gain", "w", "out"), plain)
    types |= dict.fromkeys(("logits", "routing_weights"), "*fp32")
    types |= dict.fromkeys(("counter", "expert_ids"), "*i32")
    types |= {name: "*fp32" for name, there in optional.items() if there}
    of_route = moe_route.constants(route)
    constants = {name: of_route[name] for name in of_route if name != "GROUPS_PADDED"} | _divided(route)
    share = -(-norm.width // -(-route.experts // config.rows))
    constants |= {
        "HIDDEN": norm.width,
        "COLUMNS": triton.next_power_of_2(norm.width),
        "EPS": norm.eps,
        "DTYPE": DTYPES[norm.dtype],
        "ROWS": config.rows,
        "SHARE": -(-share // ALIGNED) * ALIGNED,
        "WARPS": config.warps,
        "PDL": pdl,
    }
    return CompileRequest(
        kernel=norm_route,
        signature=types,
        constexprs={name: None for name, there in optional.items() if not there} | constants,
        gpu=gpu,
        aligned=tuple(types),
        num_warps=config.warps,
        options={"launch_pdl": True} if pdl else {},
    )


def run(
    launcher: Launcher,
    problem: Problem,
    x: torch.Tensor,
    gain: torch.Tensor,
    router: _linear.Weights,
    correction_bias: torch.Tensor | None,
    *,
    logits: torch.Tensor,
    counter: torch.Tensor,
    out: torch.Tensor,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
) -> None:
    """Launches `request(...)` for `x` [1, hidden]; writes `out`, `expert_ids`, `routing_weights` and `logits`
    [experts or more] float32. `counter` [1] int32 is zero and comes back zero. All contiguous."""
    assert x.shape[0] == 1 and x.data_ptr() % ALIGNED == 0, f"one token, not {x.shape[0]}, at {x.data_ptr()}"
    given = {"bias": router.bias, "correction_bias": correction_bias}
    optional = {name: tensor for name, tensor in given.items() if name in launcher.request.signature}
    grid = (-(-problem.route.experts // launcher.request.constexprs["ROWS"]), 1, 1)
    launcher(
        grid, x=x, gain=gain, w=router.w, out=out, logits=logits, counter=counter, expert_ids=expert_ids,
        routing_weights=routing_weights, **optional,
    )  # fmt: skip


# ---- 4. the reference


def reference(
    problem: Problem,
    x: torch.Tensor,
    gain: torch.Tensor,
    router: _linear.Weights,
    correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, expert_ids (int64) and routing_weights."""
    h = rms_norm.reference(problem.norm, x, gain)["out"]
    return h, *routed(problem, h, router, correction_bias)


def routed(
    problem: Problem, h: torch.Tensor, router: _linear.Weights, correction_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last two of h, which a sum in another order may have rounded otherwise."""
    logits = h.float() @ router.w.float().T
    logits = logits if router.bias is None else logits + router.bias
    return moe_route.reference(problem.route, logits, correction_bias)


# ---- 5. cases and inputs

EPS = 1e-5


def of_sizes(hidden: int, *route: Any, bias: bool = False, **options: Any) -> Problem:
    """A problem of `hidden`, and of moe_route.Problem's fields."""
    return Problem(rms_norm.Problem(hidden, EPS), moe_route.Problem(*route, **options), bias)


CASES = (
    of_sizes(288, 32, 4, "softmax_top_k", bias=True),
    of_sizes(256, 128, 8, "softmax"),
    of_sizes(80, 160, 8, "sigmoid", routed_scale=2.5, shared=1),
    of_sizes(128, 384, 8, "sigmoid", routed_scale=2.827, shared=1),
    of_sizes(32, 37, 16, "softmax", renormalise=False, routed_scale=0.5),
    of_sizes(64, 60, 5, "sigmoid", expert_groups=3, kept_groups=2, shared=2),
    of_sizes(48, 32, 3, "softmax", renormalise=False, expert_groups=4, bias=True),
    of_sizes(16, 8, 8, "softmax_top_k"),
)


def inputs(problem: Problem, generator: torch.Generator, **kind: Any) -> dict[str, Any]:
    """What `reference` takes, with choices that are far apart: h is rounded otherwise where a sum over
    columns is. `kind`: dtype and device."""
    device, experts = kind["device"], problem.route.experts
    found = rms_norm.inputs(problem.norm, 1, generator, **kind)
    h = rms_norm.reference(problem.norm, **found)["out"].float()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    random = {"generator": generator, "device": device}
    apart = (torch.randperm(experts, **random) + 0.5 * torch.rand(experts, **random)) / experts
    meant, correction = 8 * apart - 4, None
    if problem.route.scoring == "sigmoid":
        correction = 0.05 * normal(experts).clamp(-2, 2)
        meant = (0.2 + 0.6 * apart - correction).logit()
    bias = normal(experts) if problem.bias else None
    w = normal(experts, problem.norm.width) * problem.norm.width**-0.5
    missing = (meant if bias is None else meant - bias) - (w @ h.T).flatten()
    w += missing.unsqueeze(-1) * h / h.square().sum()
    router = _linear.Weights(w.to(kind["dtype"]), bias=bias)
    return {"x": found["x"], "gain": found["weight"], "router": router, "correction_bias": correction}
